// A plot of lines: zoom by dragging or keys, marks on the axis, redrawn when its data or the theme changes.
import { useEffect, useRef, useState } from "preact/hooks";
import uPlot from "uplot";
import { theme, variable } from "./colours";
import { short } from "./text";

export interface Line {
  label: string;
  colour: string;
  dash?: number[];
  x: number[];
  y: number[];
  width?: number;
}

export interface Mark {
  x: number;
  label: string;
  colour: string;
}

export type Range = [number, number] | null;

interface Props {
  title: string;
  lines: Line[];
  xLabel: string;
  log?: boolean;
  marks?: Mark[];
  range?: Range;
  height?: number;
  from0?: boolean;
  /** Drawn as areas on top of one another, between 0 and 1. */
  stacked?: boolean;
  onRange?: (range: Range) => void;
  onPick?: (x: number) => void;
}

export function useTheme(): string {
  const [now, set] = useState(theme());
  useEffect(() => {
    const look = () => set(theme());
    const media = matchMedia("(prefers-color-scheme: dark)");
    media.addEventListener("change", look);
    addEventListener("theme", look);
    return () => {
      media.removeEventListener("change", look);
      removeEventListener("theme", look);
    };
  }, []);
  return now;
}

export function Plot(props: Props) {
  const host = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const latest = useRef(props);
  latest.current = props;
  const shade = useTheme();
  const form = JSON.stringify([shade, props.log, props.xLabel, props.stacked, props.lines.map((line) => [line.label, line.colour, line.dash])]);
  useEffect(() => {
    const element = host.current!;
    const made = (plot.current = new uPlot(options(latest, element), joined(latest.current), element));
    const watch = new ResizeObserver(() => made.setSize({ width: element.clientWidth, height: latest.current.height ?? 280 }));
    watch.observe(element);
    return () => {
      watch.disconnect();
      plot.current = null;
      made.destroy();
    };
  }, [form]);
  useEffect(() => {
    const made = plot.current!;
    const data = joined(props);
    const all = data[0];
    const range = props.range ?? (all.length ? [all[0], all[all.length - 1]] : [0, 1]);
    made.batch(() => {
      made.setData(data, false);
      made.setScale("x", { min: range[0], max: range[1] > range[0] ? range[1] : range[0] + 1 });
    });
    // After the new scale holds: lines and marks are drawn anew also where it is the old one.
    queueMicrotask(() => plot.current === made && made.redraw());
  }, [form, props.lines, props.range, props.marks]);
  const key = (event: KeyboardEvent) => {
    const scale = plot.current!.scales.x;
    if (!props.onRange || scale.min == null || scale.max == null) return;
    const span = scale.max - scale.min;
    const middle = (scale.min + scale.max) / 2;
    const moves: Record<string, Range> = {
      "+": [middle - span / 4, middle + span / 4],
      "=": [middle - span / 4, middle + span / 4],
      "-": [middle - span, middle + span],
      ArrowLeft: [scale.min - span / 4, scale.max - span / 4],
      ArrowRight: [scale.min + span / 4, scale.max + span / 4],
      "0": null,
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    props.onRange(moves[event.key]);
  };
  const last = props.lines.map((line) => `${line.label} ${short(line.y[line.y.length - 1])}`).join(", ");
  return (
    <div
      class="plot"
      ref={host}
      tabIndex={props.onRange ? 0 : undefined}
      onKeyDown={key}
      role="img"
      aria-label={`${props.title}. Last values: ${last || "none"}.${props.onRange ? " Keys: plus, minus, arrows, 0." : ""}`}
    />
  );
}

function joined(props: Props): uPlot.AlignedData {
  if (!props.lines.length) return [[]];
  if (!props.stacked) return uPlot.join(props.lines.map((line) => [line.x, line.y] as uPlot.AlignedData));
  const sums = props.lines[0].x.map(() => 0);
  // The first source lies on top, so that areas are drawn from the largest sum to the smallest.
  const areas = [...props.lines].reverse().map((line) => line.y.map((value, i) => (sums[i] += value)));
  return [props.lines[0].x, ...areas.reverse()];
}

function options(latest: { current: Props }, element: HTMLElement): uPlot.Options {
  const props = latest.current;
  const ink = variable("--soft");
  const grid = { stroke: variable("--grid"), width: 1 };
  const font = "12px system-ui, sans-serif";
  const axis = { stroke: ink, grid, ticks: grid, font };
  return {
    width: element.clientWidth,
    height: props.height ?? 280,
    scales: {
      x: { time: false },
      y: props.log ? { distr: 3 } : props.stacked ? { range: [0, 1] } : props.from0 ? { range: (_, __, max) => [0, max > 0 ? max * 1.05 : 1] } : {},
    },
    axes: [
      { ...axis, label: props.xLabel, size: 30, labelSize: 16, labelGap: 0, labelFont: font, values: (_, ticks) => ticks.map((tick) => short(tick)) },
      { ...axis, size: 58, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : short(tick))) },
    ],
    series: [
      { label: props.xLabel, value: (_, value) => (value === null ? "–" : short(value)) },
      ...props.lines.map(
        (line, number): uPlot.Series => ({
          label: line.label,
          stroke: line.colour,
          fill: props.stacked ? line.colour : undefined,
          width: props.stacked ? 0.5 : (line.width ?? 1.5),
          dash: line.dash,
          spanGaps: true,
          points: { show: () => !props.stacked && (latest.current.lines[number]?.x.length ?? 0) < 40 },
          value: (_, value, __, index) => {
            const shown = props.stacked && index != null ? latest.current.lines[number]?.y[index] : value;
            return shown === null || shown === undefined ? "–" : short(shown);
          },
        }),
      ),
    ],
    legend: { live: true },
    cursor: { drag: { x: Boolean(props.onRange), y: false, setScale: false }, focus: { prox: 16 } },
    focus: { alpha: 0.4 },
    hooks: {
      setSelect: [
        (plot) => {
          if (plot.select.width < 4) return;
          const range: Range = [plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x")];
          plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
          latest.current.onRange?.(range);
        },
      ],
      ready: [
        (plot) => {
          plot.over.addEventListener("dblclick", () => latest.current.onRange?.(null));
          plot.over.addEventListener("click", (event) => {
            const { left } = plot.over.getBoundingClientRect();
            if (plot.select.width < 4) latest.current.onPick?.(plot.posToVal(event.clientX - left, "x"));
          });
        },
      ],
      draw: [(plot) => drawMarks(plot, latest.current.marks ?? [])],
    },
  };
}

function drawMarks(plot: uPlot, marks: Mark[]) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
  ctx.textAlign = "left";
  ctx.textBaseline = "alphabetic";
  ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
  let free = -Infinity;
  for (const mark of marks) {
    const x = plot.valToPos(mark.x, "x", true);
    if (x < bbox.left - 1 || x > bbox.left + bbox.width + 1) continue;
    ctx.strokeStyle = ctx.fillStyle = mark.colour;
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    const wide = ctx.measureText(mark.label).width;
    if (x > free && x + wide < bbox.left + bbox.width) {
      ctx.fillText(mark.label, x + 4 * devicePixelRatio, bbox.top + 12 * devicePixelRatio);
      free = x + wide + 12 * devicePixelRatio;
    }
  }
  ctx.restore();
}
