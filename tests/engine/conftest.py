"""One vLLM for the tests here; where one fails, the end of its log is in the report."""

from __future__ import annotations

import contextlib

import pytest
from real_engine import Served, vllm_server, widen_heads

from kdjax.data.tokenizer import load_tokenizer

LOG = pytest.StashKey[list]()
SHOWN_LINES = 40


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory):
    """The embedded teacher with heads of 32, which vLLM's attention on a CPU takes."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    widen_heads(folder, 32)
    return folder


@pytest.fixture(scope="session")
def tokenizer(wide_folder):
    return load_tokenizer(wide_folder)


@pytest.fixture(scope="session")
def start(tmp_path_factory, request):
    """start(model, ...) -> a server that lives as long as the session, or is killed by a test."""
    logs = request.config.stash.setdefault(LOG, [])
    with contextlib.ExitStack() as servers:

        def call(model, **changes) -> Served:
            log = tmp_path_factory.mktemp("vllm") / "log.txt"
            logs.append(log)
            return servers.enter_context(vllm_server(model, log, **changes))

        yield call


@pytest.fixture(scope="session")
def alive(start, wide_folder):
    """alive() -> the server of the wide teacher; another where a test killed it."""
    servers: list[Served] = []

    def call() -> Served:
        if not servers or not servers[-1].answers():
            servers.append(start(wide_folder))
        return servers[-1]

    return call


@pytest.fixture
def server(alive) -> Served:
    return alive()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    logs = item.config.stash.get(LOG, [])
    if report.failed and logs:
        lines = logs[-1].read_text(errors="replace").splitlines()
        odd = [line for line in lines if not line.endswith("200 OK")][-SHOWN_LINES:]
        report.sections.append((f"the end of {logs[-1]}", "\n".join(odd)))
    return report
