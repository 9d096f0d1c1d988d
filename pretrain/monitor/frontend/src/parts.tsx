// Small parts that several pages show.
import type { ComponentChildren } from "preact";
import type { Asked } from "./api";

export function Card({ title, note, children, tools }: { title: string; note?: string; children: ComponentChildren; tools?: ComponentChildren }) {
  return (
    <section class="card" aria-label={title}>
      <header>
        <h2>{title}</h2>
        {tools}
      </header>
      {note && <p class="note">{note}</p>}
      {children}
    </section>
  );
}

/** The answer's content, or what there is instead of it. */
export function Answer<T>({ asked, empty, children }: { asked: Asked<T>; empty?: (data: T) => string | false; children: (data: T) => ComponentChildren }) {
  if (asked.error && asked.data === undefined) return <p class="error" role="alert">{asked.error}</p>;
  if (asked.data === undefined) return <p class="note" aria-busy="true">Loading …</p>;
  const nothing = empty?.(asked.data);
  if (nothing) return <p class="empty">{nothing}</p>;
  return (
    <>
      {asked.error && <p class="error" role="alert">{asked.error}</p>}
      {children(asked.data)}
    </>
  );
}

export function Status({ status }: { status: string }) {
  return <span class={`status ${status}`}>{status}</span>;
}

export function Facts({ facts }: { facts: [string, ComponentChildren][] }) {
  return (
    <dl class="facts">
      {facts.map(([name, value]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>{value}</dd>
        </div>
      ))}
    </dl>
  );
}

export function Choice<T extends string | number>({ label, value, options, onChange }: { label: string; value: T; options: [T, string][]; onChange: (value: T) => void }) {
  return (
    <label class="choice">
      {label}{" "}
      <select value={value} onChange={(event) => onChange(options[event.currentTarget.selectedIndex][0])}>
        {options.map(([key, text]) => (
          <option key={key} value={key}>
            {text}
          </option>
        ))}
      </select>
    </label>
  );
}
