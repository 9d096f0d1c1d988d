import { useEffect, useState } from "preact/hooks";
import { type Detail, type EventsAnswer, post, useAnswer } from "../api";
import { colour } from "../colours";
import { Answer, Card } from "../parts";
import { percent, whole } from "../text";
import { told } from "./run";

const UNDOABLE = ["mixture", "policy", "lr_scale", "eval_every", "stop_at", "quarantine"];
type Shares = Record<string, number>;
interface Reply {
  status: string;
  reason?: string;
  event?: number;
  step?: number;
  kind?: string;
}

/** Shares with one of them changed; the others keep their proportions, and the sum stays 1. */
export function withShare(shares: Shares, name: string, share: number): Shares {
  const others = Object.keys(shares).filter((other) => other !== name);
  if (!others.length) return { [name]: 1 };
  const before = others.reduce((sum, other) => sum + shares[other], 0);
  const left = 1 - share;
  const rest = others.map((other) => [other, before > 0 ? (shares[other] / before) * left : left / others.length]);
  return { ...shares, ...Object.fromEntries(rest), [name]: share };
}

export function ControlPage({ detail, version, control }: { detail: Detail; version: unknown; control: boolean }) {
  const events = useAnswer<EventsAnswer>("events", { run: detail.run, kind: "none" }, version);
  const [reply, setReply] = useState<Reply | null>(null);
  const [busy, setBusy] = useState(false);
  const over = detail.status === "finished";
  const send = async (ask: object, why = "") => {
    setBusy(true);
    setReply(null);
    try {
      setReply(await post<Reply>("command", { run: detail.run, ask, why }));
    } catch (error) {
      setReply({ status: "failed", reason: (error as Error).message });
    }
    setBusy(false);
  };
  const mine = (events.data?.events ?? []).filter((event) => event.by.startsWith("user:"));
  return (
    <>
      {!control && <p class="note warn" role="note">This page is for looking only: start the dashboard with a token (headrace dashboard --token-file FILE) to change runs.</p>}
      {over && <p class="note">The run is finished; nothing can be changed any more.</p>}
      {reply && (
        <p class={reply.status === "accepted" ? "good" : "error"} role="status">
          {reply.status === "accepted" ? `Accepted: event ${reply.event} (${reply.kind}), from step ${whole(reply.step)} on.` : `${reply.status}: ${reply.reason ?? ""}`}
        </p>
      )}
      <fieldset disabled={!control || busy || over}>
        <Mixture detail={detail} send={send} />
        <div class="grid">
          <Card title="Learning rate" note={`Factor on the schedule; now ${detail.lr_scale}.`}>
            <form class="tools" onSubmit={(event) => (event.preventDefault(), send({ command: "set-lr-scale", scale: Number(new FormData(event.currentTarget).get("scale")) }))}>
              <label class="choice">Factor <input name="scale" type="number" min={0} max={1000} step="any" defaultValue={String(detail.lr_scale)} required /></label>
              <button type="submit">Set</button>
            </form>
          </Card>
          <Card title="Run" note="Carried out between two steps.">
            <div class="tools">
              <button onClick={() => send({ command: "save-now" })}>Save now</button>
              {detail.status === "paused" ? <button onClick={() => send({ command: "resume" })}>Go on</button> : <button onClick={() => send({ command: "pause" })}>Pause</button>}
            </div>
          </Card>
        </div>
        <Card title="What people changed">
          <Answer asked={events} empty={() => !mine.length && "Nobody has changed this run."}>
            {(data) => (
              <div class="wide"><table>
                <thead><tr><th class="number">Event</th><th class="number">From step</th><th>What</th><th>By</th><th /></tr></thead>
                <tbody>{[...mine].reverse().map((event) => {
                  const gone = data.undone.includes(event.seq);
                  return (
                    <tr key={event.seq} class={gone ? "undone" : ""}>
                      <td class="number">{event.seq}</td><td class="number">{whole(event.step)}</td>
                      <td>{event.kind.replaceAll("_", " ")} <span class="soft">{told(event)}</span></td><td>{event.by}</td>
                      <td>{UNDOABLE.includes(event.kind) && (gone ? "undone" : <button onClick={() => send({ command: "undo", event: event.seq })} aria-label={`Undo event ${event.seq}`}>Undo</button>)}</td>
                    </tr>
                  );
                })}</tbody>
              </table></div>
            )}
          </Answer>
        </Card>
      </fieldset>
    </>
  );
}

function Mixture({ detail, send }: { detail: Detail; send: (ask: object, why: string) => Promise<void> }) {
  const now: Shares = Object.fromEntries(detail.sources.map((name) => [name, detail.mixture[name] ?? 0]));
  const [wanted, setWanted] = useState<Shares | null>(null);
  const [at, setAt] = useState(0);
  const [over, setOver] = useState(0);
  const [why, setWhy] = useState("");
  const shares = wanted ?? now;
  const changed = wanted !== null && Object.keys(wanted).some((name) => Math.abs(wanted[name] - (now[name] ?? 0)) > 5e-4);
  useEffect(() => {
    if (wanted && Object.keys(wanted).length !== detail.sources.length) setWanted(null); // a source has entered
  }, [detail.sources.length]);
  const apply = async (event: Event) => {
    event.preventDefault();
    const weights = Object.fromEntries(Object.entries(shares).map(([name, share]) => [name, Number(share.toFixed(6))]));
    await send({ command: "set-mix", weights, ...(at > 0 ? { at: `+${at}` } : {}), ...(over > 1 ? { over } : {}) }, why);
    setWanted(null);
    setWhy("");
  };
  return (
    <Card title="Mixture" note={`Shares of tokens, decided by ${detail.decided_by.replace(":", " ")}. Move one and the others make room: they always sum to 100 %.`}>
      <form onSubmit={apply}>
        <div class="sliders">
          {Object.entries(shares).map(([name, share], number) => (
            <label key={name}>
              <span><span class="swatch" style={{ background: colour(number) }} /> {name}</span>
              <input
                type="range" min={0} max={1000} step={1} value={Math.round(1000 * share)} aria-label={`Share of ${name}`} aria-valuetext={percent(share)}
                onInput={(event) => setWanted(withShare(shares, name, Number(event.currentTarget.value) / 1000))}
              />
              <output>{percent(share)}</output>
            </label>
          ))}
        </div>
        <Bar title="now" shares={now} />
        <Bar title="wanted" shares={shares} />
        <div class="tools">
          <label class="choice">In <input name="at" type="number" min={0} max={1e9} value={at} onInput={(event) => setAt(Number(event.currentTarget.value))} /> steps</label>
          <label class="choice">over <input name="over" type="number" min={0} max={1e9} value={over} onInput={(event) => setOver(Number(event.currentTarget.value))} /> steps</label>
          <label class="choice grow">Why <input name="why" maxLength={2000} value={why} onInput={(event) => setWhy(event.currentTarget.value)} placeholder="for the journal" /></label>
          <button type="submit" class="main" disabled={!changed}>Apply</button>
          <button type="button" disabled={wanted === null} onClick={() => setWanted(null)}>Reset</button>
        </div>
        {changed && <p class="note">From {at > 0 ? `about step ${whole(detail.step + at)}` : "the first step that is not prepared yet"}{over > 1 ? `, in equal parts over ${whole(over)} steps` : ""}. It holds until it is undone or a policy is set.</p>}
      </form>
    </Card>
  );
}

function Bar({ title, shares }: { title: string; shares: Shares }) {
  return (
    <div class="bar">
      <span>{title}</span>
      <div role="img" aria-label={`${title}: ${Object.entries(shares).map(([name, share]) => `${name} ${percent(share)}`).join(", ")}`}>
        {Object.entries(shares).map(([name, share], number) => (
          <i key={name} style={{ width: `${100 * share}%`, background: colour(number) }} title={`${name} ${percent(share)}`} />
        ))}
      </div>
    </div>
  );
}
