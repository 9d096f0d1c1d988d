// Questions to the server, and the hooks that ask them again when there is news.
import { useEffect, useRef, useState } from "preact/hooks";

export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
  ) {
    super(message);
  }
}

async function answer<T>(response: Response): Promise<T> {
  if (response.ok) return (await response.json()) as T;
  const body = await response.json().catch(() => ({}));
  throw new ApiError(response.status, body.error ?? `the server answered ${response.status}`);
}

export async function get<T>(path: string, query: Record<string, unknown> = {}, signal?: AbortSignal): Promise<T> {
  const search = new URLSearchParams();
  for (const [key, value] of Object.entries(query)) {
    for (const one of Array.isArray(value) ? value : [value]) if (one !== undefined && one !== null) search.append(key, String(one));
  }
  return answer<T>(await fetch(`/api/${path}?${search}`, { signal }));
}

export async function post<T>(path: string, body: unknown): Promise<T> {
  const headers = { "Content-Type": "application/json" };
  return answer<T>(await fetch(`/api/${path}`, { method: "POST", headers, body: JSON.stringify(body) }));
}

export interface Asked<T> {
  data?: T;
  error?: string;
  loading: boolean;
}

/** The answer to a question, asked again whenever `version` changes; meanwhile the last answer stays. */
export function useAnswer<T>(path: string | null, query: Record<string, unknown>, version: unknown = 0): Asked<T> {
  const [asked, set] = useState<Asked<T>>({ loading: true });
  const question = path === null ? null : `${path} ${JSON.stringify(query)}`;
  const last = useRef<string | null>(null);
  useEffect(() => {
    if (path === null) return;
    const abort = new AbortController();
    const same = last.current === question;
    last.current = question;
    if (!same) set((before) => ({ ...before, loading: true }));
    get<T>(path, query, abort.signal)
      .then((data) => set({ data, loading: false }))
      .catch((error: Error) => {
        if (error.name === "AbortError") return;
        if (error instanceof ApiError && error.status === 401) return location.reload();
        set((before) => ({ data: same ? before.data : undefined, error: error.message, loading: false }));
      });
    return () => abort.abort();
  }, [question, version]);
  return asked;
}

/** The newest message of the server's stream; `lost` while there is no connection. */
export function useNews<T>(run: string | null): { news?: T; lost: boolean } {
  const [state, set] = useState<{ news?: T; lost: boolean }>({ lost: false });
  useEffect(() => {
    const stream = new EventSource(`/api/news${run === null ? "" : `?run=${encodeURIComponent(run)}`}`);
    stream.onmessage = (event) => set({ news: JSON.parse(event.data) as T, lost: false });
    stream.onopen = () => set((before) => ({ ...before, lost: false }));
    stream.onerror = () => set((before) => ({ ...before, lost: true }));
    return () => stream.close();
  }, [run]);
  return state;
}

export interface Summary {
  run: string;
  title: string;
  status: string;
  step: number;
  steps: number | null;
  tokens: number | null;
  loss: number | null;
  tokens_per_s: number | null;
  left_s: number | null;
  modified: number | null;
  indexed: number;
  damage: string;
  version: string;
}

export interface Detail extends Summary {
  series: string[];
  sources: string[];
  layers: Record<string, string[]>;
  mixture: Record<string, number>;
  decided_by: string;
  lr_scale: number;
  dynamics_every: number;
}

export interface Points {
  x: number[];
  y: number[];
  not_finite: number[];
}

export interface SeriesAnswer {
  indexed: number;
  series: Record<string, Points>;
}

export interface JournalEvent {
  seq: number;
  time: number;
  step: number;
  tokens: number;
  kind: string;
  by: string;
  data: Record<string, unknown>;
}

export interface EventsAnswer {
  events: JournalEvent[];
  undone: number[];
  left_out: number;
  damage: string;
}

export interface Session {
  known: boolean;
  control: boolean;
  version: string;
}
