import { useState } from "preact/hooks";
import { type Summary, useAnswer, useNews } from "../api";
import { Answer, Status } from "../parts";
import { link } from "../place";
import { ago, duration, short, whole } from "../text";

type Row = Summary & { spark: number[] };

export function RunsPage() {
  const { news, lost } = useNews<{ runs: Record<string, Partial<Summary>> }>(null);
  const runs = useAnswer<{ runs: Row[]; root: string }>("runs", {}, JSON.stringify(news));
  const [wanted, setWanted] = useState("");
  return (
    <>
      <div class="headline">
        <h1>Runs</h1>
        <input type="search" placeholder="Find a run" aria-label="Find a run" value={wanted} onInput={(event) => setWanted(event.currentTarget.value)} />
      </div>
      {lost && <p class="error" role="status">No connection to the dashboard; trying again …</p>}
      <Answer asked={runs} empty={(data) => !data.runs.length && `There is no run in ${data.root} yet. Start one: headrace train CONFIG`}>
        {(data) => {
          const rows = data.runs.filter((row) => `${row.run} ${row.title} ${row.status}`.toLowerCase().includes(wanted.toLowerCase()));
          if (!rows.length) return <p class="empty">No run's name or state has “{wanted}” in it.</p>;
          return (
            <div class="wide">
              <table class="runs">
                <thead>
                  <tr>
                    <th>Run</th>
                    <th>State</th>
                    <th>Loss</th>
                    <th class="number">Last</th>
                    <th class="number">Steps</th>
                    <th class="number">Tokens</th>
                    <th class="number">Tokens/s</th>
                    <th class="number">Left</th>
                    <th class="number">Last record</th>
                  </tr>
                </thead>
                <tbody>
                  {rows.map((row) => (
                    <tr key={row.run}>
                      <td>
                        <a href={link("run", row.run)}>{row.run}</a>
                        {row.title !== row.run && !row.run.endsWith(row.title) && <div class="note">{row.title}</div>}
                        {row.damage && <div class="note warn">{row.damage}</div>}
                      </td>
                      <td>
                        <Status status={row.status} />
                      </td>
                      <td>
                        <Spark values={row.spark} />
                      </td>
                      <td class="number">{short(row.loss)}</td>
                      <td class="number">
                        {whole(row.step)}
                        {row.steps ? <span class="soft"> / {whole(row.steps)}</span> : null}
                      </td>
                      <td class="number">{short(row.tokens)}</td>
                      <td class="number">{short(row.tokens_per_s)}</td>
                      <td class="number">{duration(row.left_s)}</td>
                      <td class="number">{ago(row.modified)}</td>
                    </tr>
                  ))}
                </tbody>
              </table>
            </div>
          );
        }}
      </Answer>
    </>
  );
}

function Spark({ values }: { values: number[] }) {
  if (values.length < 2) return <span class="soft">–</span>;
  const low = Math.min(...values);
  const span = Math.max(...values) - low || 1;
  const points = values.map((value, i) => `${((100 * i) / (values.length - 1)).toFixed(1)},${(22 - (20 * (value - low)) / span).toFixed(1)}`);
  return (
    <svg class="spark" viewBox="0 0 100 24" width="100" height="24" role="img" aria-label={`Loss from ${short(values[0])} to ${short(values[values.length - 1])}`}>
      <polyline points={points.join(" ")} fill="none" />
    </svg>
  );
}
