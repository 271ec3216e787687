"""Verbs of an evaluation that ask: eval asks the model, judge asks about its answers."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from mis_jax.cli.common import (
    AdapterFolder,
    AutoDtype,
    Failed,
    MeshSizes,
    console,
    err_console,
    load_quietly,
    mesh_of,
)
from mis_jax.cli.reporting import BenchmarkFile, show_results, use_benchmark_file
from mis_jax.storage.locks import locked_folder
from mis_jax.storage.paths import destination_path

if TYPE_CHECKING:
    from mis_jax.evals.chat_client import ChatClient
    from mis_jax.evals.runner import AnswerFn, JudgingTask
    from mis_jax.evals.types import Benchmark, Sample

# Options of both verbs that talk to a server.
KeyVariable = Annotated[
    str | None, arg(help="Environment variable that holds the server's API key.")
]
Concurrency = Annotated[int, arg(help="Maximum number of concurrent requests to the server.")]
RequestsPerMinute = Annotated[
    float | None, arg(help="Maximum number of requests sent to the server per minute.")
]

_HTTP = ("http://", "https://")
_ANSWERING = 600.0  # seconds for a whole answer; a verdict is a few words


def eval_(
    model: Annotated[Positional[str | None], arg(metavar="MODEL")] = None,
    *,
    adapter: AdapterFolder = None,
    benchmarks: str | None = None,
    data_root: Path | None = None,
    out: Path | None = None,
    list_benchmarks: Annotated[bool, arg(name="list")] = False,
    benchmark_file: BenchmarkFile = None,
    limit: int | None = None,
    shard: str | None = None,
    batch_size: int = 32,
    dtype: AutoDtype = None,
    int8_weights: bool = False,
    int8_cache: bool = False,
    mesh: MeshSizes = MeshSizes(),  # noqa: B008  frozen
    check_digests: bool = True,
    model_name: str | None = None,
    api_key_env: KeyVariable = None,
    concurrency: Concurrency = 8,
    requests_per_minute: RequestsPerMinute = None,
    internvl_fields: bool = False,
    include_reasoning: bool = False,
) -> None:
    """Generate a model's answers to benchmarks. Run the same command again to resume.

    Example: mis-jax eval runs/mirage/final --benchmarks mis_hard --data-root data --out runs/eval

    Args:
        model: Checkpoint folder (any of the three layouts), OUT/checkpoints/STEP of a run, or the
            base URL (http://host/v1) of an OpenAI-compatible server.
        benchmarks: Comma-separated list of benchmark ids (see --list).
        list_benchmarks: List the benchmarks, with their published sizes, judges and metrics.
        data_root: Folder with one subfolder of published files per benchmark.
        out: Output folder of the evaluation run.
        limit: Evaluate only the first N samples of each benchmark.
        shard: Evaluate shard i of n, written i/n: every n-th sample starting at the i-th; combine
            shards with `mis-jax merge`.
        batch_size: Maximum number of sequences decoded at once (checkpoints only).
        dtype: Data type for weights and activations; auto: float32 on CPU, otherwise the
            checkpoint's.
        int8_weights: Quantize the decoder's weights to int8: half the memory, answers may differ.
        int8_cache: Quantize the KV cache to int8: half the memory, answers may differ.
        mesh: Number of devices along each axis of the device mesh.
        check_digests: Verify the weights against their stored SHA-256 digests, if present.
        model_name: Name of the model on the server; if unset, the only one that it lists.
        internvl_fields: Send max_dynamic_patch and system_prompt to the server (`mis-jax serve` is
            detected automatically).
        include_reasoning: Put the reasoning that the server sends apart from the answer
            (reasoning_content or reasoning) before it; without this option it is left out.
    """
    from mis_jax.cli.eta import TimeAhead, answers_ahead
    from mis_jax.evals.async_map import Stopped
    from mis_jax.evals.benchmarks import get_benchmark, size_note, wordless_note
    from mis_jax.evals.benchmarks.general import md5_note
    from mis_jax.evals.run_dir import keep_samples, open_run
    from mis_jax.evals.runner import generate_answers, part_from
    from mis_jax.terminal import steps_bar

    use_benchmark_file(benchmark_file)
    if list_benchmarks:
        _list_benchmarks()
        return
    if model is None or benchmarks is None or data_root is None or out is None:
        needed = {"MODEL": model, "--benchmarks": benchmarks, "--data-root": data_root}
        missing = [name for name, value in (needed | {"--out": out}).items() if value is None]
        raise ValueError(f"eval also needs {', '.join(missing)}; see mis-jax eval --help")
    place = destination_path(out, "--out")
    part = part_from(limit, shard)
    chosen = [get_benchmark(name) for name in benchmarks.split(",")]
    sets = [benchmark.load(data_root) for benchmark in chosen]
    if model.startswith(_HTTP):
        if int8_weights or int8_cache:
            raise ValueError("--int8-weights and --int8-cache belong to a checkpoint, not a server")
        if adapter is not None:
            raise ValueError("--adapter belongs to a checkpoint, not a server")
        client = _client(
            model, model_name, api_key_env, concurrency, requests_per_minute, timeout=_ANSWERING
        )
        tested = _served(client, internvl_fields, include_reasoning)
    elif model_name or include_reasoning:
        option = "--model-name" if model_name else "--include-reasoning"
        raise ValueError(f"{option} belongs to a server; give its http://host/v1 as MODEL")
    else:
        tested = _local(
            Path(model), adapter, batch_size, dtype, mesh, int8_weights, int8_cache, check_digests
        )
    with locked_folder(place):
        open_run(
            out,
            model=tested.name,
            fingerprint=tested.fingerprint,
            data_root=data_root,
            conditions=tested.conditions,
        )
        asked = [part.of(samples) for samples in sets]
        for benchmark, whole, samples in zip(chosen, sets, asked, strict=True):
            keep_samples(out, benchmark.name, samples, part.described(len(whole)))
        for benchmark, whole, samples in zip(chosen, sets, asked, strict=True):
            for note in (
                size_note(benchmark.name, len(whole)),
                wordless_note(benchmark.name, whole),
                md5_note(benchmark.name, data_root),
            ):
                if note:
                    err_console.print(note, markup=False)
            _say(answers_ahead(benchmark, samples))
        failed, problem = 0, None
        answer = tested.load()
        at_once = concurrency if model.startswith(_HTTP) else batch_size
        ahead = TimeAhead(sum(map(len, asked)), at_once, _say)
        with steps_bar(err_console) as bar:
            for benchmark, whole, samples in zip(chosen, sets, asked, strict=True):
                try:
                    done = generate_answers(
                        benchmark,
                        samples,
                        answer(benchmark),
                        out,
                        ahead.watch(bar.task(benchmark.name)),
                        batch_size=batch_size,
                        part=part.described(len(whole)),
                    )
                except Stopped as stopped:
                    raise Failed(f"{stopped}; call again to go on") from None
                failed, problem = failed + done.failed, done.problem or problem
                if done.empty:
                    _say(f"{benchmark.name}: {done.empty} of {done.answered} answers are empty")
        if failed:
            raise Failed(
                f"{failed} sample(s) have no answer (the last: {problem}); call again to retry them"
            )
        own = f" --benchmark-file {benchmark_file}" if benchmark_file else ""
        needed = "" if all(one.default_judge for one in chosen) else " --judge http://host/v1"
        console.print(f"answers in {out}; next: mis-jax judge {out}{own}{needed}")


def judge(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    *,
    judge: str = "default",
    judge_model: str | None = None,
    judge_key_env: KeyVariable = None,
    benchmarks: str | None = None,
    concurrency: Concurrency = 8,
    requests_per_minute: RequestsPerMinute = None,
    max_calls: int | None = None,
    verdict_cache: Path | None = None,
    recheck: int = 0,
    dtype: AutoDtype = None,
    mesh: MeshSizes = MeshSizes(),  # noqa: B008  frozen
    data_root: Path | None = None,
    benchmark_file: BenchmarkFile = None,
    json: bool = False,
) -> None:
    """Judge the answers of an evaluation run. Run the same command again to resume.

    Example: mis-jax judge runs/eval --judge http://127.0.0.1:8000/v1 --judge-model NAME

    Args:
        run: Folder of the evaluation run (`mis-jax eval --out`).
        judge: Judge to use: default (each benchmark's own), the base URL (http://host/v1) of an
            OpenAI-compatible server, the folder of a Llama Guard checkpoint, rules, exact,
            options, or none to recompute the results from existing verdicts.
        judge_model: Name of the judge model on the server; if unset, the only one that it lists.
        benchmarks: Comma-separated list of benchmark ids to judge; if unset, all of the run.
        max_calls: Maximum total number of requests, including the self-test and retries.
        verdict_cache: Folder of cached verdicts, shared between runs.
        recheck: Judge N answers of each benchmark a second time and report the judge's agreement
            with itself.
        dtype: Data type of the guard model; auto: the checkpoint's.
        mesh: Number of devices along each axis of the guard model's device mesh.
        data_root: New location of the benchmark data, if it moved since `mis-jax eval`.
        json: Print results.json.
    """
    from mis_jax.evals.async_map import Stopped
    from mis_jax.evals.judges import JUDGES, get_judge
    from mis_jax.evals.judges.llama_guard import guard_judges
    from mis_jax.evals.judges.llm import http_judges
    from mis_jax.evals.run_dir import data_root_of, read_manifest
    from mis_jax.evals.runner import judge_run
    from mis_jax.evals.scoring import summarise
    from mis_jax.evals.verdict_cache import VerdictCache
    from mis_jax.terminal import steps_bar

    use_benchmark_file(benchmark_file)
    read_manifest(run)  # before a lock is written into what is no run
    if judge == "none":
        with locked_folder(run):
            results = summarise(run)
        show_results(results, run, json)
        return
    if recheck < 0:
        raise ValueError(f"--recheck is {recheck}; give a number of answers")
    root = data_root or data_root_of(run)
    names = benchmarks.split(",") if benchmarks else None
    client, chosen = None, None
    if judge.startswith(_HTTP):
        client = _client(
            judge, judge_model, judge_key_env, concurrency, requests_per_minute, max_calls,
            option="--judge-model",
        )  # fmt: skip
        chosen = http_judges(client)
    elif judge_model:
        raise ValueError("--judge-model belongs to a server; give its http://host/v1 as --judge")
    elif verdict_cache or recheck:
        option = "--verdict-cache" if verdict_cache else "--recheck"
        raise ValueError(f"{option} belongs to a server; give its http://host/v1 as --judge")
    elif judge not in JUDGES and Path(judge).is_dir():
        chosen = guard_judges(Path(judge), dtype, lambda: _guard(Path(judge), dtype, mesh))
    elif judge != "default":
        chosen = get_judge(judge)
    with locked_folder(run), steps_bar(err_console) as bar:
        try:
            results = judge_run(
                run,
                chosen,
                root,
                benchmarks=names,
                cache=VerdictCache(verdict_cache) if verdict_cache else None,
                recheck=recheck,
                leave_out=lambda reason: _say(f"left out: {reason}"),
                announce=_announce(client) if client else None,
                progress=bar.task,
            )
        except Stopped as stopped:
            raise Failed(f"{stopped}; the verdicts so far are kept: call again to go on") from None
    show_results(results, run, json, names)


@dataclass(frozen=True)
class _Model:
    """What a run is a run of; `load` gives what answers, so that it is loaded last."""

    name: str
    fingerprint: str
    conditions: tuple[str, ...]
    load: Callable[[], Callable[["Benchmark"], "AnswerFn"]]


def _local(
    folder: Path,
    adapter: Path | None,
    rows: int,
    dtype: str | None,
    mesh: MeshSizes,
    int8_weights: bool,
    int8_cache: bool,
    check_digests: bool,
) -> _Model:
    """A checkpoint, and the adapter that is merged into it."""
    from mis_jax.checkpoint.load import open_checkpoint
    from mis_jax.checkpoint.trained_model import model_fingerprint, model_name
    from mis_jax.evals.models import answers_of
    from mis_jax.evals.run_dir import int8_conditions

    def load() -> Callable[["Benchmark"], "AnswerFn"]:
        network, processor = load_quietly(
            folder,
            dtype,
            mesh,
            adapter=adapter,
            int8=int8_weights,
            check_digests=check_digests,
        )
        return lambda benchmark: answers_of(
            network, processor, benchmark, rows=rows, int8_cache=int8_cache
        )

    if adapter is not None:  # the wrong base is soon given: it must not begin a run
        open_checkpoint(folder, adapter, check_digests=False)
    conditions = int8_conditions(weights=int8_weights, cache=int8_cache)
    name, fingerprint = model_name(folder, adapter), model_fingerprint(folder, adapter)
    return _Model(name, fingerprint, conditions, load)


def _served(client: "ChatClient", takes_settings: bool, includes_reasoning: bool) -> _Model:
    """A model behind an endpoint."""
    from mis_jax.evals.endpoint import endpoint_answers, open_endpoint

    endpoint = open_endpoint(
        client, takes_settings=takes_settings, includes_reasoning=includes_reasoning
    )
    if not endpoint.takes_settings:
        _say(
            f"{client.base_url} does not say that it is mis-jax: tiles and system turn are its own "
            "(see --internvl-fields), which the run's protocol ids will say"
        )
    return _Model(
        client.model,
        endpoint.fingerprint,
        endpoint.conditions,
        lambda: lambda benchmark: endpoint_answers(endpoint, benchmark),
    )


def _client(
    url: str,
    model: str | None,
    key_env: str | None,
    concurrency: int,
    requests_per_minute: float | None,
    max_calls: int | None = None,
    option: str = "--model-name",
    timeout: float = 120.0,
) -> "ChatClient":
    from mis_jax.evals.chat_client import ChatClient, Patience

    key = None
    if key_env is not None and not (key := os.environ.get(key_env, "").strip()):
        raise ValueError(f"the environment variable {key_env} is empty; put the key into it")

    def client(name: str) -> ChatClient:
        return ChatClient(
            url,
            name,
            api_key=key,
            concurrency=concurrency,
            requests_per_minute=requests_per_minute,
            max_calls=max_calls,
            patience=Patience(timeout=timeout),
        )

    if not model:
        model = client("").only_model(option)
        _say(f"{url}: its only model is {model}")
    return client(model)


def _guard(folder: Path, dtype: str | None, mesh: MeshSizes) -> Any:
    from mis_jax.inference.guard import load_guard

    return load_guard(folder, dtype=dtype, mesh=mesh_of(mesh))


def _announce(
    client: "ChatClient",
) -> Callable[[list[tuple["JudgingTask", list[tuple["Sample", str]]]]], None]:
    """Prints what a judge behind an endpoint is about to cost."""
    from mis_jax.cli.eta import verdicts_ahead
    from mis_jax.evals.judges.llm import prompt_size

    def announce(owed: list[tuple["JudgingTask", list[tuple["Sample", str]]]]) -> None:
        for one, pairs in owed:
            calls, tokens, pictures = prompt_size(pairs, one.benchmark)
            seconds = calls * client.pace()
            _say(verdicts_ahead(one.benchmark.name, one.judge.id, calls, tokens, pictures, seconds))

    return announce


def _list_benchmarks() -> None:
    """A line for each benchmark: id, published size, judge, metrics."""
    from mis_jax.evals.benchmarks import BENCHMARKS
    from mis_jax.evals.controls import CONTROLS

    width = max(map(len, BENCHMARKS))
    for name, benchmark in BENCHMARKS.items():
        size = f"{benchmark.published_size:,}" if benchmark.published_size else "-"
        judge = benchmark.default_judge or benchmark.judging
        line = f"{name:{width}}  {size:>5}  {judge:23}  {', '.join(benchmark.metrics)}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    controls = ", ".join(f"@{name}" for name in CONTROLS)
    _say(
        f"Columns: id, published size, judge or judging protocol, metrics. Behind each id with "
        f"images may stand {controls}."
    )


def _say(text: str) -> None:
    err_console.print(text, markup=False, highlight=False, soft_wrap=True)
