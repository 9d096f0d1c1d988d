import { useMemo } from "preact/hooks";
import { type Detail, type SeriesAnswer, useAnswer } from "../api";
import { colour } from "../colours";
import { Answer, Card, Facts } from "../parts";
import { type Line, Plot } from "../plot";
import { bytes, moment, percent, short, whole } from "../text";

interface System {
  starts: { time: number; step: number; kind: string; why: string }[];
  checkpoints: { time: number; step: number; tokens: number | null; there: boolean }[];
  attempts: Record<string, string>[];
}

const PARTS: [string, string][] = [["data_wait_s", "waiting for data"], ["passes_s", "forward and backward"], ["update_s", "update"]];
const USE: Record<string, string> = { mfu: "attention in full", mfu_causal: "its causal half" };
const NUMBERS = ["step_s", "data_wait_s", "passes_s", "update_s", "tokens_per_s", "peak_memory_bytes", "model_flops_per_s"];

export function SystemPage({ detail, version }: { detail: Detail; version: unknown }) {
  const { run } = detail;
  const utilisation = Object.keys(USE).filter((name) => detail.series.includes(name));
  const perRank = detail.series.filter((name) => name.startsWith("rank_"));
  const asked = useAnswer<SeriesAnswer>("series", { run, name: [...NUMBERS, ...utilisation, ...perRank].slice(0, 100), width: 600 }, version);
  const system = useAnswer<System>("system", { run }, version);
  const series = asked.data?.series ?? {};
  const times = useMemo(
    () => lines(series, [["step_s", "whole step"], ...PARTS]),
    [asked.data],
  );
  const speed = useMemo(() => lines(series, [["tokens_per_s", "tokens/s"]]), [asked.data]);
  const memory = useMemo(() => lines(series, [["peak_memory_bytes", "peak memory"]]), [asked.data]);
  const use = useMemo(() => lines(series, utilisation.map((name) => [name, USE[name] ?? name])), [asked.data]);
  const flops = useMemo(() => lines(series, [["model_flops_per_s", "FLOP/s"]]), [asked.data]);
  const ranks = useMemo(() => lines(series, perRank.map((name) => [name, name])), [asked.data]);
  const lastOf = (name: string) => series[name]?.y.at(-1) ?? null;
  const step = lastOf("step_s");
  const wait = lastOf("data_wait_s");
  const mfu = lastOf("mfu");
  return (
    <>
      <Facts
        facts={[
          ["step time", step === null ? "–" : `${short(step)} s`],
          ["waiting for data", step && wait !== null ? percent(wait / step) : "–"],
          ["MFU", mfu === null ? "–" : percent(mfu)],
          ["tokens/s", short(detail.tokens_per_s)],
          ["peak memory", bytes(lastOf("peak_memory_bytes"))],
          ["starts", whole(system.data?.starts.filter((row) => row.kind === "run_started" || row.kind === "resumed").length)],
          ["checkpoints", whole(system.data?.checkpoints.length)],
        ]}
      />
      <Answer asked={asked} empty={(data) => !Object.keys(data.series).length && "No step has been recorded yet."}>
        {() => (
          <div class="grid">
            <Card title="Step time" note="Seconds; of each part the rank that took longest."><Plot title="Step time" lines={times} xLabel="step" height={220} from0 /></Card>
            <Card title="Throughput" note="Tokens per second, all ranks together."><Plot title="Throughput" lines={speed} xLabel="step" height={220} from0 /></Card>
            <Card title="Peak memory" note="Bytes on the fullest rank."><Plot title="Peak memory" lines={memory} xLabel="step" height={220} from0 /></Card>
            {flops.length > 0 && <Card title="Arithmetic" note="Operations the model needs, by second and device."><Plot title="Arithmetic" lines={flops} xLabel="step" height={220} from0 /></Card>}
            {use.length > 0 && <Card title="Model FLOPs utilisation" note="Share of the device's peak."><Plot title="MFU" lines={use} xLabel="step" height={220} from0 /></Card>}
            {ranks.length > 0 && <Card title="By rank"><Plot title="By rank" lines={ranks} xLabel="step" height={220} from0 /></Card>}
          </div>
        )}
      </Answer>
      <div class="grid">
        <Card title="Starts and trouble">
          <Answer asked={system} empty={(data) => !data.starts.length && "The journal is empty."}>
            {(data) => (
              <div class="wide scroll"><table>
                <thead><tr><th class="number">Step</th><th>What</th><th>Why</th><th>Time (UTC)</th></tr></thead>
                <tbody>{[...data.starts].reverse().map((row, i) => (
                  <tr key={i}><td class="number">{whole(row.step)}</td><td>{row.kind.replaceAll("_", " ")}</td><td>{row.why}</td><td class="soft">{moment(row.time)}</td></tr>
                ))}</tbody>
              </table></div>
            )}
          </Answer>
        </Card>
        <Card title="Checkpoints">
          <Answer asked={system} empty={(data) => !data.checkpoints.length && "There is no checkpoint yet."}>
            {(data) => (
              <div class="wide scroll"><table>
                <thead><tr><th class="number">Step</th><th class="number">Tokens</th><th>Kept</th><th>Time (UTC)</th></tr></thead>
                <tbody>{[...data.checkpoints].reverse().map((row, i) => (
                  <tr key={i}><td class="number">{whole(row.step)}</td><td class="number">{short(row.tokens)}</td><td>{row.there ? "yes" : "no"}</td><td class="soft">{moment(row.time)}</td></tr>
                ))}</tbody>
              </table></div>
            )}
          </Answer>
        </Card>
      </div>
      {system.data && system.data.attempts.length > 0 && (
        <Card title="Launches">
          <div class="wide scroll"><table>
            <thead><tr>{Object.keys(system.data.attempts[0]).map((key) => <th key={key}>{key}</th>)}</tr></thead>
            <tbody>{[...system.data.attempts].reverse().map((row, i) => (
              <tr key={i}>{Object.keys(system.data!.attempts[0]).map((key) => <td key={key}>{row[key]}</td>)}</tr>
            ))}</tbody>
          </table></div>
        </Card>
      )}
    </>
  );
}

function lines(series: SeriesAnswer["series"], names: [string, string][]): Line[] {
  return names.flatMap(([name, label], number) => (series[name] ? [{ label, colour: colour(number), ...series[name] }] : []));
}
