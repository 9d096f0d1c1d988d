import { useMemo, useState } from "preact/hooks";
import { type Detail, useAnswer } from "../api";
import { colour } from "../colours";
import { Answer, Card } from "../parts";
import { Plot } from "../plot";
import { percent, short, whole } from "../text";

interface Mixture {
  x: number[];
  step: number[];
  asked: Record<string, number[]>;
  realised: Record<string, number[]>;
  tokens: Record<string, number>;
}

interface Sources {
  epochs: { step?: number; sources?: Record<string, number>; error?: string };
  rejects: { counts: { source: string; reason: string; count: number }[]; newest: { source: string; file: string; record: string; reason: string }[]; is_all: boolean };
}

interface Doc {
  slot: number;
  source: string;
  file: string;
  record: number;
  token_start: number;
  token_stop: number;
  text: string;
  characters: number;
  given: string | null;
}

/** `steps`: those that have been trained so far, which `detail` may be behind of. */
export function DataPage({ detail, steps, version }: { detail: Detail; steps: number; version: unknown }) {
  const { run } = detail;
  const mixture = useAnswer<Mixture>("mixture", { run, width: 300 }, version);
  const sources = useAnswer<Sources>("sources", { run }, version);
  const [step, setStep] = useState<number | null>(null);
  const pick = (tokens: number) => {
    const { x, step: steps } = mixture.data!;
    const at = x.findIndex((edge) => edge >= tokens);
    setStep(steps[at < 0 ? steps.length - 1 : at]);
  };
  return (
    <>
      <Card title="Mixture over tokens" note={`Decided by ${detail.decided_by.replace(":", " ")}. Click a place to see what was in its batch.`}>
        <Answer asked={mixture} empty={(data) => !data.x.length && "No step has been recorded yet."}>
          {(data) => (
            <div class="grid">
              <Shares title="Asked" x={data.x} shares={data.asked} onPick={pick} />
              <Shares title="Realised" x={data.x} shares={data.realised} onPick={pick} />
            </div>
          )}
        </Answer>
      </Card>
      <Card title="Sources">
        <Answer asked={mixture} empty={(data) => !data.x.length && "No source has given anything yet."}>{(data) => <SourceTable mixture={data} sources={sources.data} />}</Answer>
        {sources.data?.epochs.error && <p class="note">Epochs: {sources.data.epochs.error}</p>}
      </Card>
      <Batch run={run} last={steps - 1} step={step} onStep={setStep} />
      <Card title="Rejected records">
        <Answer asked={sources} empty={(data) => !data.rejects.newest.length && "Nothing was rejected."}>
          {(data) => (
            <>
              <p>{data.rejects.counts.map((row) => `${row.source}: ${whole(row.count)} × ${row.reason}`).join(" · ")}</p>
              <div class="wide scroll">
                <table>
                  <thead>
                    <tr><th>Source</th><th>File</th><th class="number">Record</th><th>Why</th></tr>
                  </thead>
                  <tbody>
                    {data.rejects.newest.map((row, i) => (
                      <tr key={i}><td>{row.source}</td><td class="path">{row.file}</td><td class="number">{row.record}</td><td>{row.reason}</td></tr>
                    ))}
                  </tbody>
                </table>
              </div>
            </>
          )}
        </Answer>
      </Card>
    </>
  );
}

function Shares({ title, x, shares, onPick }: { title: string; x: number[]; shares: Record<string, number[]>; onPick: (tokens: number) => void }) {
  const lines = useMemo(() => Object.entries(shares).map(([label, y], number) => ({ label, colour: colour(number), x, y })), [shares]);
  return (
    <div>
      <h3>{title}</h3>
      <Plot title={`Mixture ${title.toLowerCase()}`} lines={lines} xLabel="tokens" stacked height={240} onPick={onPick} />
    </div>
  );
}

function SourceTable({ mixture, sources }: { mixture: Mixture; sources?: Sources }) {
  const names = Object.keys(mixture.tokens);
  const total = Object.values(mixture.tokens).reduce((sum, one) => sum + one, 0) || 1;
  const rejected = (name: string) => sources?.rejects.counts.filter((row) => row.source === name).reduce((sum, row) => sum + row.count, 0) ?? 0;
  return (
    <div class="wide">
      <table>
        <thead>
          <tr>
            <th>Source</th><th class="number">Asked now</th><th class="number">Tokens</th><th class="number">Share so far</th><th class="number">Epochs</th><th class="number">Rejected</th>
          </tr>
        </thead>
        <tbody>
          {names.map((name, number) => (
            <tr key={name}>
              <td><span class="swatch" style={{ background: colour(number) }} /> {name}</td>
              <td class="number">{percent(mixture.asked[name]?.at(-1) ?? 0)}</td>
              <td class="number">{short(mixture.tokens[name])}</td>
              <td class="number">{percent(mixture.tokens[name] / total)}</td>
              <td class="number">{sources?.epochs.sources?.[name]?.toFixed(2) ?? "–"}</td>
              <td class="number">{whole(rejected(name))}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

function Batch({ run, last, step, onStep }: { run: string; last: number; step: number | null; onStep: (step: number) => void }) {
  const batch = useAnswer<{ step: number; documents: Doc[] }>(step === null ? null : "batch", { run, step });
  const [slot, setSlot] = useState(0);
  const submit = (event: Event) => {
    event.preventDefault();
    const text = new FormData(event.currentTarget as HTMLFormElement).get("step");
    onStep(Math.min(last, Math.max(0, Number(text))));
  };
  const form = (
    <form class="tools" onSubmit={submit}>
      <label class="choice">
        Step <input name="step" type="number" min={0} max={Math.max(0, last)} defaultValue={String(step ?? Math.max(0, last))} key={step ?? -1} />
      </label>
      <button type="submit" disabled={last < 0}>Show</button>
    </form>
  );
  return (
    <Card title="What is in a batch" note="Made again from the raw files, as headrace data trace does." tools={form}>
      {step === null ? (
        <p class="empty">Choose a step here, or click into the mixture.</p>
      ) : batch.loading ? (
        <p class="note" aria-busy="true">Making the batch of step {whole(step)} again …</p>
      ) : (
        <Answer asked={batch}>
          {(data) => {
            const slots = [...new Set(data.documents.map((doc) => doc.slot))];
            const at = slots.includes(slot) ? slot : slots[0];
            const shown = data.documents.filter((doc) => doc.slot === at);
            return (
              <>
                <div class="slots" role="group" aria-label="Sequences of the batch">
                  {slots.slice(0, 512).map((one) => (
                    <button key={one} aria-pressed={one === at} onClick={() => setSlot(one)}>{one}</button>
                  ))}
                </div>
                <p class="note">Step {whole(data.step)}, sequence {at}: {shown.length} documents of {shown[0]?.source}. {whole(data.documents.length)} in the whole batch.</p>
                {shown.map((doc, i) => (
                  <article class="document" key={i}>
                    <header>
                      <strong>{doc.source}</strong> <span class="path">{doc.file}</span> · record {whole(doc.record)} · tokens {whole(doc.token_start)}–{whole(doc.token_stop)}
                    </header>
                    <pre tabIndex={0}>{doc.given ?? doc.text}{doc.characters > doc.text.length ? " …" : ""}</pre>
                  </article>
                ))}
              </>
            );
          }}
        </Answer>
      )}
    </Card>
  );
}
