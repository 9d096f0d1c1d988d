"""Every address of the dashboard.

    GET  /, /app.js, /app.css, /favicon.svg      the page
    GET  /api/session                            whether a token is wanted, was given, and runs can be changed
    POST /api/login  {"token": …}                a cookie for the token
    GET  /api/runs                               every run, with the newest numbers
    GET  /api/run?run=NAME                       one run: names of its series, sources, layers
    GET  /api/series?run=&name=&name=&axis=step|tokens&from=&to=&width=&window=
    GET  /api/events?run=&after=&kind=           the journal
    GET  /api/mixture?run=&width=                shares asked for and realised
    GET  /api/batch?run=&step=                   the documents of a step's batch
    GET  /api/heatmap?run=&metric=&axis=&width=  a metric by layer
    GET  /api/sources?run=                       epochs and rejects
    GET  /api/system?run=                        starts of the run, checkpoints
    GET  /api/news?run=                          server-sent events; without `run` about the list of runs
    POST /api/command  {"run", "ask", "why"}     a command to a live run, as `headrace ctl` sends it

Answers are JSON; a mistake is `{"error": one line}` with the status that fits. Names are looked up, never joined to
paths.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import orjson
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from headrace.errors import HeadraceError, UnreachableError
from headrace.version import __version__
from pretrain.control.client import ByFile, ask
from pretrain.monitor import views
from pretrain.monitor.access import COOKIE, Access
from pretrain.monitor.batch_documents import documents
from pretrain.monitor.live import News
from pretrain.monitor.run_files import readable
from pretrain.monitor.run_folder import RunFolder
from pretrain.monitor.runs import Runs
from pretrain.monitor.source_epochs import epochs
from pretrain.monitor.system import starts_and_checkpoints

STATIC: Final = Path(__file__).parent / "static"
PAGE: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/app.css": ("app.css", "text/css; charset=utf-8"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}
WIDEST: Final = 4000
"""Pixels of a plot."""
MOST_NAMES: Final = 100
"""Series in one answer."""
KEPT_ANSWERS: Final = 200
COMMAND_WAIT_S: Final = 30.0


class Dashboard:
    """The runs of a folder, and what is answered about them."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.news = News(self._look)
        self._answers: OrderedDict[tuple[Any, ...], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, request: Request) -> RunFolder:
        """The run that is asked about, up to date. Raises HTTPException 404."""
        run = self.runs.get(request.query_params.get("run", ""))
        if run is None:
            raise HTTPException(404, "there is no such run here")
        run.update()
        return run

    def once(self, request: Request, view: Callable[[RunFolder], Any]) -> bytes:
        """The view's answer; computed once for all who ask the same of the same version of a run."""
        run = self.run(request)
        key = (request.url.path, run.name, run.version, request.url.query)
        with self._lock:
            if key in self._answers:
                self._answers.move_to_end(key)
                return self._answers[key]
        answer = self.now(request, view, run)
        with self._lock:
            self._answers[key] = answer
            while len(self._answers) > KEPT_ANSWERS:
                self._answers.popitem(last=False)
        return answer

    def now(self, request: Request, view: Callable[[RunFolder], Any], run: RunFolder | None = None) -> bytes:
        """The view's answer as things are: of views that look at more than what a run's version speaks of."""
        return orjson.dumps(view(run or self.run(request)))

    def all_runs(self) -> bytes:
        """The list of runs, the newest first."""
        found = list(self.runs.all().values())
        budget = max(0.01, 0.5 / max(1, len(found)))  # a folder of long runs is read over several calls
        rows = [_row(run, budget) for run in found]
        rows.sort(key=lambda row: row[0], reverse=True)
        return orjson.dumps({"runs": [orjson.Fragment(row) for _, row in rows], "root": readable(self.runs.root.name)})

    def _look(self, topic: str) -> dict[str, Any]:
        if not topic:
            found = self.runs.all()
            # A state follows from the clock, too: a killed run writes nothing any more.
            return {"runs": {name: _told(run, 0.05, "version", "status", "damage") for name, run in found.items()}}
        run = self.runs.get(topic)
        if run is None:
            return {"gone": True}
        return _told(run, 0.3)


def _row(run: RunFolder, budget_s: float) -> tuple[float, bytes]:
    """When a run has last written, and its row of the list; a run that fails has a row that says so."""
    try:
        run.update(budget_s)
        row = views.listed(run)
        return float(row["modified"] or 0), orjson.dumps(row)
    except Exception as error:  # its files may be anybody's, and the other runs are to be seen all the same
        return 0.0, orjson.dumps(run.failed(error) | {"spark": []})


def _told(run: RunFolder, budget_s: float, *keys: str) -> dict[str, Any]:
    """News of a run: its summary, or those keys of it."""
    try:
        run.update(budget_s)
        summary = run.summary()
    except Exception as error:  # as in _row
        summary = run.failed(error)
    return {key: summary[key] for key in keys} if keys else summary


def make_app(runs: Runs, token: str = "") -> Access:
    """The whole dashboard as an ASGI application. Raises OSError when the page's files are missing."""
    dashboard = Dashboard(runs)
    files = {path: ((STATIC / name).read_bytes(), kind) for path, (name, kind) in PAGE.items()}

    async def page(request: Request) -> Response:
        content, kind = files[request.url.path]
        return Response(content, media_type=kind)

    def answering(view: Callable[[RunFolder, Request], Any], *, kept: bool = True) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            ask_for = dashboard.once if kept else dashboard.now
            return _json(await run_in_threadpool(ask_for, request, lambda run: view(run, request)))

        return answer

    async def all_runs(_: Request) -> Response:
        return _json(await run_in_threadpool(dashboard.all_runs))

    async def session(request: Request) -> Response:
        known = access.knows(request.headers)
        content = {"known": known, "control": known and access.has_token, "version": __version__}
        return _json(orjson.dumps(content))

    async def login(request: Request) -> Response:
        given = (await _body(request)).get("token")
        value = access.session(given) if isinstance(given, str) else None
        if value is None:
            raise HTTPException(401, "this is not the dashboard's token" if access.has_token else "no token is needed")
        response = _json(b'{"known":true}')
        response.set_cookie(COOKIE, value, httponly=True, samesite="strict", secure=request.url.scheme == "https")
        return response

    async def batch(request: Request) -> Response:
        return _json(await run_in_threadpool(_batch, dashboard, request))

    async def news(request: Request) -> Response:
        topic = request.query_params.get("run", "")
        if topic and dashboard.runs.get(topic) is None:
            raise HTTPException(404, "there is no such run here")
        if dashboard.news.is_full:
            raise HTTPException(503, "too many viewers")
        return StreamingResponse(dashboard.news.stream(topic), media_type="text/event-stream")

    async def command(request: Request) -> Response:
        if not access.has_token:
            raise HTTPException(403, "start the dashboard with a token to change runs")
        body = await _body(request)
        run = dashboard.runs.get(body["run"]) if isinstance(body.get("run"), str) else None
        if run is None:
            raise HTTPException(404, "there is no such run here")
        wanted, why = body.get("ask"), body.get("why", "")
        if not isinstance(wanted, dict) or not isinstance(why, str):
            raise HTTPException(400, "ask: an object, why: text")
        return _json(orjson.dumps(await run_in_threadpool(_command, run, wanted, why)))

    routes = [
        *(Route(path, page) for path in PAGE),
        Route("/api/session", session),
        Route("/api/login", login, methods=["POST"]),
        Route("/api/runs", all_runs),
        Route("/api/run", answering(lambda run, _: views.detail(run), kept=False)),
        Route("/api/series", answering(_series)),
        Route("/api/events", answering(_events)),
        Route(
            "/api/mixture", answering(lambda run, request: views.mixture(run, _whole(request, "width", 300, WIDEST)))
        ),
        Route("/api/heatmap", answering(_heat_map)),
        Route("/api/sources", answering(_sources, kept=False)),
        Route("/api/system", answering(lambda run, _: starts_and_checkpoints(run), kept=False)),
        Route("/api/batch", batch),
        Route("/api/news", news),
        Route("/api/command", command, methods=["POST"]),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _mistake, Exception: _bug})
    access = Access(app, token)
    return access


def _series(run: RunFolder, request: Request) -> Any:
    names = request.query_params.getlist("name")[:MOST_NAMES]
    begin, end = _number(request, "from", -math.inf), _number(request, "to", math.inf)
    width, window = _whole(request, "width", 800, WIDEST), _whole(request, "window", 1, 10**7)
    return views.series(run, names, _axis(request), begin, end, width, window)


def _events(run: RunFolder, request: Request) -> Any:
    return views.events(run, _whole(request, "after", -1, 2**53, least=-1), request.query_params.getlist("kind"))


def _sources(run: RunFolder, _: Request) -> Any:
    return {"rejects": views.rejects(run), "epochs": epochs(run)}


def _heat_map(run: RunFolder, request: Request) -> Any:
    metric = request.query_params.get("metric", "")
    layers = views.detail(run)["layers"].get(metric, [])
    return views.heat_map(run, metric, layers, _axis(request), _whole(request, "width", 200, WIDEST))


def _batch(dashboard: Dashboard, request: Request) -> bytes:
    run = dashboard.run(request)
    step, done = _whole(request, "step", 0, 2**53, least=0), run.summary()["step"]
    if step >= done:
        raise HTTPException(400, f"step {step} has not been trained; {done} steps are done")
    try:
        found = documents(run.path, step, run.journal.version)
    except HeadraceError as error:
        raise HTTPException(409, str(error)) from None
    except OSError as error:
        raise HTTPException(409, f"{error.filename or 'data'}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:  # a journal by another hand
        raise HTTPException(409, f"the run's data cannot be opened ({type(error).__name__})") from None
    return orjson.dumps({"step": step, "documents": found})


def _command(run: RunFolder, wanted: dict[str, Any], why: str) -> dict[str, Any]:
    try:
        return ask(ByFile(run.path), wanted, why, COMMAND_WAIT_S)
    except UnreachableError as error:
        raise HTTPException(504, str(error).replace(str(run.path), run.name)) from None
    except HeadraceError as error:  # RefusedError among them: it could not even be sent
        return {"status": "refused", "reason": str(error).replace(str(run.path), run.name)}


def _axis(request: Request) -> str:
    return "tokens" if request.query_params.get("axis") == "tokens" else "step"


def _whole(request: Request, name: str, usual: int, most: int, least: int = 1) -> int:
    text = request.query_params.get(name, "")
    if not text:
        return usual
    if not text.removeprefix("-").isdecimal() or not text.isascii() or len(text) > 17:
        raise HTTPException(400, f"{name}: a whole number")
    return max(least, min(most, int(text)))


def _number(request: Request, name: str, usual: float) -> float:
    try:
        found = float(request.query_params.get(name) or usual)
    except ValueError:
        raise HTTPException(400, f"{name}: a number") from None
    return usual if math.isnan(found) else found


async def _body(request: Request) -> dict[str, Any]:
    try:
        found = orjson.loads(await request.body())
    except orjson.JSONDecodeError:
        raise HTTPException(400, "not JSON") from None
    if not isinstance(found, dict):
        raise HTTPException(400, "send an object")
    return found


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")


async def _mistake(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Response(orjson.dumps({"error": error.detail}), error.status_code, media_type="application/json")


async def _bug(_: Request, error: Exception) -> Response:
    text = f"the dashboard failed ({type(error).__name__}); its log says where"
    return Response(orjson.dumps({"error": text}), 500, media_type="application/json")
