import { useEffect, useMemo, useState } from "preact/hooks";
import { type Detail, type EventsAnswer, get, type JournalEvent, type Points, type SeriesAnswer, type Summary, useAnswer } from "../api";
import { colour, dash, variable } from "../colours";
import { Answer, Card, Choice } from "../parts";
import { type Line, type Mark, Plot, type Range } from "../plot";
import { moment, short, whole } from "../text";

const WINDOWS: [number, string][] = [[1, "none"], [10, "10 steps"], [100, "100 steps"], [1000, "1,000 steps"], [10000, "10,000 steps"]];
const TITLES: Record<string, string> = {
  grad_norm: "Gradient norm",
  lr: "Learning rate",
  loss_scale: "Loss scale",
  mtp_loss: "Multi-token loss",
  noise_scale: "Gradient noise scale",
};
const OTHERS = Object.keys(TITLES);

export function RunPage({ detail, version }: { detail: Detail; version: unknown }) {
  const [axis, setAxis] = useState<"step" | "tokens">("step");
  const [scale, setScale] = useState<"linear" | "log">("linear");
  const [window, setWindow] = useState(1);
  const [range, setRange] = useState<Range>(null);
  const [marked, setMarked] = useState(true);
  const [compared, setCompared] = useState<string[]>([]);
  const { run } = detail;
  const losses = detail.series.filter((name) => name.startsWith("source_loss/"));
  const held = detail.series.filter((name) => name.startsWith("val_loss/"));
  const perByte = detail.series.filter((name) => name.startsWith("val_bits_per_byte/"));
  const scores = detail.series.filter((name) => name.startsWith("eval/"));
  const query = { run, axis, window, width: Math.min(1600, innerWidth), from: range?.[0], to: range?.[1] };
  const total = useAnswer<SeriesAnswer>("series", { ...query, name: ["loss"] }, version);
  const sources = useAnswer<SeriesAnswer>("series", { ...query, name: [...losses, ...held].slice(0, 100) }, version);
  const rest = useAnswer<SeriesAnswer>("series", { ...query, window: 1, name: OTHERS.filter((name) => detail.series.includes(name)) }, version);
  const measured = useAnswer<SeriesAnswer>(perByte.length + scores.length ? "series" : null, { ...query, window: 1, name: [...perByte, ...scores].slice(0, 100) }, version);
  const events = useAnswer<EventsAnswer>("events", { run }, version);
  const others = useCompared(compared, query, version);
  const marks = useMemo(() => (marked ? (events.data?.events ?? []).filter(worthMarking).map((event) => mark(event, axis)) : []), [events.data, marked, axis]);
  const plot = { xLabel: axis === "step" ? "step" : "tokens", log: scale === "log", range, marks, onRange: setRange };
  const totalLines = useMemo(() => [...lines(total.data, ["loss"], 0), ...others], [total.data, others]);
  const sourceLines = useMemo(
    () => [...lines(sources.data, losses, 0), ...lines(sources.data, held, 0).map((line) => ({ ...line, width: 3 }))],
    [sources.data],
  );
  const perByteLines = useMemo(() => lines(measured.data, perByte, 0), [measured.data]);
  const scoreLines = useMemo(() => lines(measured.data, scores, 0), [measured.data]);
  const lost = total.data?.series.loss?.not_finite ?? [];
  return (
    <>
      <div class="tools" role="group" aria-label="How curves are drawn">
        <Choice label="Axis" value={axis} options={[["step", "steps"], ["tokens", "tokens"]]} onChange={(next) => (setRange(null), setAxis(next))} />
        <Choice label="Scale" value={scale} options={[["linear", "linear"], ["log", "logarithmic"]]} onChange={setScale} />
        <Choice label="Smoothing" value={window} options={WINDOWS} onChange={setWindow} />
        <label class="choice">
          <input type="checkbox" checked={marked} onChange={(event) => setMarked(event.currentTarget.checked)} /> Journal events
        </label>
        <button onClick={() => setRange(null)} disabled={range === null}>
          Whole run
        </button>
      </div>
      <Card title="Loss" note="Drag to zoom, double-click for the whole run. Nats per token." tools={<Compare run={run} chosen={compared} onChange={setCompared} />}>
        {lost.length > 0 && <p class="error">Not finite at step {lost.slice(-5).map((step) => whole(step)).join(", ")}.</p>}
        <Answer asked={total} empty={(data) => !data.series.loss && "No step has been recorded yet."}>
          {() => <Plot title="Loss" lines={totalLines} height={320} {...plot} />}
        </Answer>
      </Card>
      <Card title="Loss by source" note="Thick lines: held-out text.">
        <Answer asked={sources} empty={(data) => !Object.keys(data.series).length && "No source has a loss yet."}>
          {() => <Plot title="Loss by source" lines={sourceLines} height={320} {...plot} />}
        </Answer>
      </Card>
      {perByteLines.length > 0 && (
        <Card title="Held-out text, bits per byte" note="Does not depend on the tokenizer.">
          <Plot title="Bits per byte" lines={perByteLines} height={240} {...plot} />
        </Card>
      )}
      {scoreLines.length > 0 && (
        <Card title="Scores of tasks" note="headrace eval, by task and metric.">
          <Plot title="Scores of tasks" lines={scoreLines} height={240} {...plot} log={false} />
        </Card>
      )}
      <div class="grid">
        {OTHERS.filter((name) => rest.data?.series[name]).map((name, number) => (
          <Card key={name} title={TITLES[name]}>
            <Other name={name} points={rest.data!.series[name]} number={number} plot={plot} />
          </Card>
        ))}
      </div>
      <Card title="Journal" note="Decisions that shape the run, the newest first; a policy's own changes of the mixture are on the page Data.">
        <Answer asked={events} empty={(data) => !data.events.length && "The journal is empty."}>
          {(data) => <Journal events={data.events} undone={data.undone} />}
        </Answer>
      </Card>
    </>
  );
}

function Other({ name, points, number, plot }: { name: string; points: Points; number: number; plot: object }) {
  const drawn = useMemo(() => [{ label: TITLES[name].toLowerCase(), colour: colour(number + 1), ...points }], [points]);
  return <Plot title={name} lines={drawn} height={200} xLabel="step" {...plot} />;
}

function lines(answer: SeriesAnswer | undefined, names: string[], first: number): Line[] {
  return names
    .map((name, number) => ({ name, number: first + number }))
    .filter(({ name }) => answer?.series[name])
    .map(({ name, number }) => ({ label: name.replace("source_loss/", "").replace("val_loss/", "held out ").replace(/^(val_bits_per_byte|eval)\//, ""), colour: colour(number), dash: dash(number), ...answer!.series[name] }));
}

function useCompared(names: string[], query: object, version: unknown): Line[] {
  const [found, set] = useState<Line[]>([]);
  const question = JSON.stringify([names, query]);
  useEffect(() => {
    let wanted = true;
    const asked = names.map((run) => get<SeriesAnswer>("series", { ...query, run, name: ["loss"] }).catch(() => undefined));
    Promise.all(asked).then((answers) => {
      if (wanted) set(answers.flatMap((answer, i) => (answer?.series.loss ? [{ label: names[i], colour: colour(i + 1), dash: dash(i + 1), ...answer.series.loss }] : [])));
    });
    return () => {
      wanted = false;
    };
  }, [question, names.length ? version : 0]);
  return found;
}

function Compare({ run, chosen, onChange }: { run: string; chosen: string[]; onChange: (names: string[]) => void }) {
  const runs = useAnswer<{ runs: Summary[] }>("runs", {});
  const others = (runs.data?.runs ?? []).map((row) => row.run).filter((name) => name !== run);
  if (!others.length) return null;
  return (
    <details class="compare">
      <summary>Compare{chosen.length ? ` (${chosen.length})` : ""}</summary>
      <div>
        {others.slice(0, 200).map((name) => (
          <label key={name}>
            <input type="checkbox" checked={chosen.includes(name)} onChange={(event) => onChange(event.currentTarget.checked ? [...chosen, name] : chosen.filter((one) => one !== name))} /> {name}
          </label>
        ))}
      </div>
    </details>
  );
}

function worthMarking(event: JournalEvent): boolean {
  if (event.step === 0) return false; // what the run began with
  return event.by.startsWith("user:") || ["resumed", "rollback", "anomaly", "stage"].includes(event.kind);
}

function mark(event: JournalEvent, axis: "step" | "tokens"): Mark {
  const bad = event.kind === "rollback" || event.kind === "anomaly";
  return { x: axis === "step" ? event.step : event.tokens, label: event.kind.replaceAll("_", " "), colour: bad ? variable("--bad") : variable("--soft") };
}

export function Journal({ events, undone }: { events: JournalEvent[]; undone: number[] }) {
  return (
    <div class="wide scroll">
      <table>
        <thead>
          <tr>
            <th class="number">Event</th>
            <th class="number">Step</th>
            <th>What</th>
            <th>By</th>
            <th>Time (UTC)</th>
          </tr>
        </thead>
        <tbody>
          {[...events].reverse().map((event) => (
            <tr key={event.seq} class={undone.includes(event.seq) ? "undone" : ""}>
              <td class="number">{event.seq}</td>
              <td class="number">{whole(event.step)}</td>
              <td>
                {event.kind.replaceAll("_", " ")} <span class="soft">{told(event)}</span>
              </td>
              <td>{event.by}</td>
              <td class="soft">{moment(event.time)}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

export function told(event: JournalEvent): string {
  return Object.entries(event.data)
    .filter(([key, value]) => key !== "via" && value !== "" && value !== 0)
    .map(([key, value]) => {
      if (key === "weights" && value && typeof value === "object") {
        const total = Object.values(value as Record<string, number>).reduce((sum, one) => sum + one, 0) || 1;
        return Object.entries(value as Record<string, number>).map(([name, weight]) => `${name} ${short(weight / total)}`).join(", ");
      }
      return key === "why" ? `“${value}”` : `${key} ${typeof value === "object" ? JSON.stringify(value) : value}`;
    })
    .join(" · ");
}
