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

/** The answer to a question, asked again whenever `version` changes; meanwhile the last answer stays. An answer that is
 * under way is waited for: of a run that writes faster than the server answers, nothing would ever be seen. */
export function useAnswer<T>(path: string | null, query: Record<string, unknown>, version: unknown = 0): Asked<T> {
  const [asked, set] = useState<Asked<T>>({ loading: true });
  const question = path === null ? null : `${path} ${JSON.stringify(query)}`;
  const again = useRef(() => {});
  const seen = useRef(version);
  useEffect(() => {
    if (path === null) return;
    const abort = new AbortController();
    let asking = false;
    let old = false;
    let answered = false;
    const ask = async () => {
      old = asking;
      if (asking) return;
      asking = true;
      try {
        const data = await get<T>(path, query, abort.signal);
        if (abort.signal.aborted) return;
        set({ data, loading: false });
        answered = true;
      } catch (problem) {
        if (abort.signal.aborted) return;
        if (problem instanceof ApiError && problem.status === 401) return location.reload();
        set((before) => ({ data: answered ? before.data : undefined, error: (problem as Error).message, loading: false }));
      }
      asking = false;
      if (old) void ask();
    };
    set((before) => ({ ...before, loading: true }));
    again.current = () => void ask();
    void ask();
    return () => {
      again.current = () => {};
      abort.abort();
    };
  }, [question]);
  useEffect(() => {
    if (seen.current !== version) again.current();
    seen.current = version;
  }, [version]);
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
