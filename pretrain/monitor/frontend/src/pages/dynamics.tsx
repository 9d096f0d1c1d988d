import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { type Detail, type SeriesAnswer, useAnswer } from "../api";
import { colour, heat } from "../colours";
import { Answer, Card, Choice } from "../parts";
import { type Line, Plot, useTheme } from "../plot";
import { short } from "../text";

interface HeatMap {
  x: number[];
  layers: string[];
  values: (number | null)[][];
}

const FIVE: [string, string, string][] = [
  ["max_attention_logit", "Largest attention logit", "largest of all layers"],
  ["query_norm", "Mean query norm", "mean over layers"],
  ["output_logit_mean", "Mean output logit", ""],
  ["mlp_gradient_rms", "Gradient of the MLPs' first layers", "RMS, mean over layers"],
  ["block_output_rms", "Block output", "RMS, mean over layers"],
];

export function DynamicsPage({ detail, version }: { detail: Detail; version: unknown }) {
  const metrics = Object.keys(detail.layers);
  const [metric, setMetric] = useState(metrics[0] ?? "");
  if (!metrics.length) {
    return <p class="empty">This run does not measure its dynamics. Set metrics.dynamics.every to a number of steps to see attention logits, norms, gradients and updates by layer.</p>;
  }
  const chosen = metrics.includes(metric) ? metric : metrics[0];
  return (
    <>
      <Card title="By layer" note="Mean of each layer over the run; the scale is of this map." tools={<Choice label="Metric" value={chosen} options={metrics.map((name) => [name, name.replaceAll("_", " ")])} onChange={setMetric} />}>
        <LayerMap run={detail.run} metric={chosen} version={version} />
      </Card>
      <div class="grid">
        {FIVE.map(([name, title, note], number) => (
          <Card key={name} title={title} note={note}>
            <OneMetric detail={detail} name={name} number={number} version={version} />
          </Card>
        ))}
      </div>
    </>
  );
}

function OneMetric({ detail, name, number, version }: { detail: Detail; name: string; number: number; version: unknown }) {
  const layers = (detail.layers[name] ?? []).filter((layer) => /^\d+$/.test(layer));
  const names = layers.length ? layers.map((layer) => `${name}/${layer}`) : [name];
  const asked = useAnswer<SeriesAnswer>("series", { run: detail.run, name: names.slice(0, 100), width: 400 }, version);
  const lines = useMemo((): Line[] => {
    const found = names.map((one) => asked.data?.series[one]).filter((one) => one !== undefined);
    if (!found.length) return [];
    const values = new Map<number, number[]>();
    for (const points of found) points.x.forEach((x, i) => values.set(x, [...(values.get(x) ?? []), points.y[i]]));
    const x = [...values.keys()].sort((a, b) => a - b);
    const join = (all: number[]) => (name.startsWith("max_") ? Math.max(...all) : all.reduce((sum, one) => sum + one, 0) / all.length);
    return [{ label: name.replaceAll("_", " "), colour: colour(number), x, y: x.map((at) => join(values.get(at)!)) }];
  }, [asked.data]);
  return (
    <Answer asked={asked} empty={() => !lines.length && "Not measured."}>
      {() => <Plot title={name} lines={lines} xLabel="step" height={190} />}
    </Answer>
  );
}

function LayerMap({ run, metric, version }: { run: string; metric: string; version: unknown }) {
  const asked = useAnswer<HeatMap>("heatmap", { run, metric, width: 240 }, version);
  return (
    <Answer asked={asked} empty={(data) => !data.layers.length && "Nothing was measured yet."}>
      {(data) => <Heat map={data} title={metric.replaceAll("_", " ")} />}
    </Answer>
  );
}

function Heat({ map, title }: { map: HeatMap; title: string }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const [told, tell] = useState("");
  const shade = useTheme();
  const all = map.values.flat().filter((value): value is number => value !== null);
  const low = Math.min(...all);
  const high = Math.max(...all);
  // Gradients of layers can be orders of magnitude apart.
  const log = low > 0 && high / low > 50;
  const part = (value: number) => (high === low ? 0.5 : log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low));
  const columns = map.values[0].length;
  useEffect(() => {
    const image = new ImageData(columns, map.layers.length);
    map.values.forEach((row, layer) =>
      row.forEach((value, column) => {
        const pixel = 4 * (layer * columns + column);
        if (value === null) return;
        image.data.set([...heat(part(value)), 255], pixel);
      }),
    );
    canvas.current!.getContext("2d")!.putImageData(image, 0, 0);
  }, [map, shade]);
  const look = (event: PointerEvent) => {
    const box = canvas.current!.getBoundingClientRect();
    const column = Math.min(columns - 1, Math.floor((columns * (event.clientX - box.left)) / box.width));
    const layer = Math.min(map.layers.length - 1, Math.floor((map.layers.length * (event.clientY - box.top)) / box.height));
    tell(`layer ${map.layers[layer]}, step ${short(map.x[column])}: ${short(map.values[layer]?.[column])}`);
  };
  return (
    <div class="heat">
      <div class="layers" aria-hidden="true">
        {map.layers.map((layer) => <span key={layer}>{layer.replaceAll("_", " ")}</span>)}
      </div>
      <canvas
        ref={canvas}
        width={columns}
        height={map.layers.length}
        style={{ height: `${Math.max(120, Math.min(480, 26 * map.layers.length))}px` }}
        onPointerMove={look}
        onPointerLeave={() => tell("")}
        role="img"
        aria-label={`${title} of ${map.layers.length} layers over steps ${short(map.x[0])} to ${short(map.x.at(-1))}, between ${short(low)} and ${short(high)}`}
      />
      <div class="axis"><span>step {short(map.x[0])}</span><span>{short(map.x.at(-1))}</span></div>
      <div class="scale">
        <span>{short(low)}</span><i /><span>{short(high)}{log ? " (logarithmic)" : ""}</span>
        <output>{told}</output>
      </div>
    </div>
  );
}
