// The frame around the pages: which page, which run, login, theme.
import { render } from "preact";
import { useEffect, useState } from "preact/hooks";
import "uplot/dist/uPlot.min.css";
import "./style.css";
import { type Detail, get, post, type Session, type Summary, useAnswer, useNews } from "./api";
import { theme } from "./colours";
import { ControlPage } from "./pages/control";
import { DataPage } from "./pages/data";
import { DynamicsPage } from "./pages/dynamics";
import { RunPage } from "./pages/run";
import { RunsPage } from "./pages/runs";
import { SystemPage } from "./pages/system";
import { Status } from "./parts";
import { link, PAGES, type PageName } from "./place";
import { duration, short, whole } from "./text";

const TITLES: Record<PageName, string> = { run: "Run", data: "Data", dynamics: "Dynamics", system: "System", control: "Control" };

function place(): { page: PageName | "runs"; run: string } {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const run = new URLSearchParams(query).get("run") ?? "";
  const page = PAGES.find((name) => name === path);
  return page && run ? { page, run } : { page: "runs", run: "" };
}

function App() {
  const [session, setSession] = useState<Session | null>(null);
  const [problem, setProblem] = useState("");
  const [at, setAt] = useState(place());
  useEffect(() => {
    const move = () => setAt(place());
    addEventListener("hashchange", move);
    get<Session>("session").then(setSession, (error: Error) => setProblem(error.message));
    return () => removeEventListener("hashchange", move);
  }, []);
  useEffect(() => {
    document.title = at.run ? `${at.run} · ${TITLES[at.page as PageName]} · Headrace` : "Headrace";
  }, [at]);
  if (problem) return <p class="error" role="alert">The dashboard does not answer: {problem}</p>;
  if (!session) return <p class="note">Loading …</p>;
  if (!session.known) return <Login />;
  return (
    <>
      <a class="skip" href="#main" onClick={(event) => (event.preventDefault(), document.getElementById("main")?.focus())}>
        Skip to content
      </a>
      {at.page === "runs" ? (
        <>
          <Top run="" />
          <main id="main" tabIndex={-1}>
            <RunsPage />
          </main>
        </>
      ) : (
        <RunFrame key={at.run} run={at.run} page={at.page} control={session.control} />
      )}
      <footer>Headrace {session.version}</footer>
    </>
  );
}

function Top({ run, page }: { run: string; page?: PageName }) {
  return (
    <header class="top">
      <a class="brand" href="#/">
        <img src="/favicon.svg" alt="" width="22" height="22" /> Headrace
      </a>
      <nav aria-label="Pages">
        <a href="#/" aria-current={run ? undefined : "page"}>
          Runs
        </a>
        {run &&
          PAGES.map((name) => (
            <a key={name} href={link(name, run)} aria-current={name === page ? "page" : undefined}>
              {TITLES[name]}
            </a>
          ))}
      </nav>
      <ThemeButton />
    </header>
  );
}

function ThemeButton() {
  const [now, set] = useState(theme());
  const turn = () => {
    const next = now === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    localStorage.setItem("theme", next);
    dispatchEvent(new Event("theme"));
    set(next);
  };
  return (
    <button class="theme" onClick={turn} aria-label={`Use ${now === "dark" ? "light" : "dark"} colours`}>
      {now === "dark" ? "☀" : "☾"}
    </button>
  );
}

function RunFrame({ run, page, control }: { run: string; page: PageName; control: boolean }) {
  const { news, lost } = useNews<Summary & { gone?: boolean }>(run);
  const detail = useAnswer<Detail>("run", { run }, news?.version);
  const shown = news && !news.gone ? news : detail.data;
  const version = news?.version ?? detail.data?.version;
  return (
    <>
      <Top run={run} page={page} />
      <main id="main" tabIndex={-1}>
        <div class="headline">
          <h1>{detail.data?.title ?? run}</h1>
          {shown && (
            <p>
              <Status status={shown.status} /> step {whole(shown.step)}
              {shown.steps ? ` of ${whole(shown.steps)}` : ""} · {short(shown.tokens)} tokens · loss {short(shown.loss)} ·{" "}
              {short(shown.tokens_per_s)} tokens/s{shown.left_s !== null ? ` · ${duration(shown.left_s)} left` : ""}
            </p>
          )}
          {shown?.steps ? <progress max={shown.steps} value={shown.step} aria-label="Steps done" /> : null}
        </div>
        {lost && <p class="error" role="status">No connection to the dashboard; trying again …</p>}
        {shown && shown.indexed < 1 && <p class="note" role="status">Reading metrics: {Math.floor(100 * shown.indexed)} % …</p>}
        {shown?.damage && <p class="error" role="alert">{shown.damage}</p>}
        {detail.error && !detail.data && <p class="error" role="alert">{detail.error}. <a href="#/">All runs</a></p>}
        {detail.data && page === "run" && <RunPage detail={detail.data} version={version} />}
        {detail.data && page === "data" && <DataPage detail={detail.data} steps={shown?.step ?? detail.data.step} version={version} />}
        {detail.data && page === "dynamics" && <DynamicsPage detail={detail.data} version={version} />}
        {detail.data && page === "system" && <SystemPage detail={detail.data} version={version} />}
        {detail.data && page === "control" && <ControlPage detail={detail.data} version={version} control={control} />}
      </main>
    </>
  );
}

function Login() {
  const [error, setError] = useState("");
  const submit = async (event: Event) => {
    event.preventDefault();
    const token = new FormData(event.currentTarget as HTMLFormElement).get("token");
    try {
      await post("login", { token });
      location.reload();
    } catch (problem) {
      setError((problem as Error).message);
    }
  };
  return (
    <main class="login">
      <h1>Headrace</h1>
      <form onSubmit={submit}>
        <label>
          The dashboard's token
          <input name="token" type="password" autocomplete="current-password" required autofocus />
        </label>
        <button type="submit">Open</button>
        {error && <p class="error" role="alert">{error}</p>}
      </form>
    </main>
  );
}

const chosen = localStorage.getItem("theme");
if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
render(<App />, document.getElementById("app")!);
