"""vLLM as an engine: ``AsyncLLM`` and vLLM's own HTTP API in one asyncio thread.

The only module that imports vLLM, and only inside functions. vLLM changes ``os.environ`` of the
process it runs in; a worker starts nothing else, so that is its own affair.
"""

from __future__ import annotations

import asyncio
import copy
import importlib
import logging
import multiprocessing
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import trio

from rbee import guard
from rbee.aio import Aio, AioTask, Outbox, open_aio
from rbee.errors import BadInputError, MachineError, PeerError, RbeeError
from rbee.hints import infer, install
from rbee.machine import this_machine, threads
from rbee.model import WorkerSpec
from rbee.wire.messages import ExecuteRequest
from rbee.worker import compilers, pools, vllm_plan, weights
from rbee.worker.amx import do_without_amx
from rbee.worker.bridge import AioApp
from rbee.worker.engine import ASGIApp, Chunk, Engine, Progress
from rbee.worker.engine_args import refused, spread_lists
from rbee.worker.limits import answer_budget, shorter
from rbee.worker.templates import skip_processors

log = logging.getLogger(__name__)

CLOSE = {
    "cpu": 0.0,
    "cuda": 2.0,
}  # seconds for EngineCore to end by itself; a CPU one leaves nothing
NOTICE = 0.2  # seconds between looks at the engine's health
LOOK = 0.25  # seconds between looks at the weights
STARTING = "starting the engine"
LONG_TEXT = 20_000  # characters above which tokenising leaves the main thread
REFUSALS = (ValueError, TypeError, KeyError, OSError, NotImplementedError)
OPTIONAL = ("torchvision", "torchaudio", "torchcodec")

# What a worker needs and vLLM would import late. Some names exist in some versions only.
PRELOADED = (
    "torch",
    "uvloop",
    "hypercorn.trio",
    "rbee.worker.daemon",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.engine.arg_utils",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.metrics.loggers",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.model_executor.models.registry",
    "vllm.model_executor.models.llama",
    "vllm.tokenizers.hf",
    "vllm.renderers.hf",
    "vllm.entrypoints.launchers.api_server.routers",
    "vllm.entrypoints.serve",
    "vllm.entrypoints.generate.api_router",
    "vllm.entrypoints.openai.chat_completion.serving",
    "vllm.entrypoints.openai.completion.serving",
    "vllm.entrypoints.openai.responses.serving",
    "vllm.entrypoints.scale_out.factories",
    "vllm.entrypoints.serve.sagemaker.api_router",
    "vllm.entrypoints.mcp.tool_server",
    "vllm.entrypoints.openai.chat_completion.api_router",
    "vllm.entrypoints.openai.completion.api_router",
    "vllm.entrypoints.openai.responses.api_router",
    "vllm.entrypoints.anthropic.api_router",
    "vllm.entrypoints.generate.generative_scoring.api_router",
    "vllm.entrypoints.scale_out.render.api_router",
    "vllm.entrypoints.scale_out.derender.api_router",
    "vllm.entrypoints.scale_out.token_in_token_out.api_router",
    "vllm.entrypoints.serve.elastic_ep.api_router",
    "vllm.entrypoints.serve.instrumentator.offline_docs",
    "vllm.entrypoints.serve.lora.api_router",
    "vllm.entrypoints.serve.profile.api_router",
    "vllm.entrypoints.serve.tokenize.api_router",
    "vllm.entrypoints.serve.utils.fingerprint",
    "vllm.v1.core.sched.async_scheduler",
    "vllm.v1.metrics.reader",
    "prometheus_fastapi_instrumentator",
    "transformers.models.llama",
    "transformers.models.auto.tokenization_auto",
    "torch.distributed",
)
PRELOADED_FOR = {
    "cpu": ("vllm.v1.worker.cpu_worker", "vllm.v1.attention.backends.cpu_attn"),
    # None of them makes a CUDA context.
    "cuda": (
        "vllm.v1.worker.gpu_worker",
        "vllm.v1.worker.gpu_model_runner",
        "vllm.v1.worker.gpu.model_runner",
        "vllm.v1.attention.backends.flash_attn",
        "vllm.v1.attention.backends.triton_attn",
        "vllm.v1.sample.sampler",
        "vllm.compilation.backends",
        "vllm.compilation.cuda_graph",
        "vllm.compilation.piecewise_backend",
        "vllm.distributed.elastic_ep.elastic_execute",
        "vllm.model_executor.warmup.kernel_warmup",
        "vllm.model_executor.warmup.minimax_m3_msa_warmup",
        "vllm.third_party.deep_gemm.envs",
        "vllm.utils.jit_monitor",
        "vllm.v1.attention.backends.flex_attention",
        "vllm.v1.attention.backends.turboquant_attn",
        "vllm.v1.worker.gpu.mm.rope",
        "vllm.v1.worker.gpu.model_states.default",
        "triton.experimental.gluon",
        "torch._dynamo.backends.inductor",
        "torch._inductor.choices",
        "torch._inductor.codegen.cuda_combined_scheduling",
        "torch._inductor.codegen.memory_planning",
        "torch._inductor.compile_fx",
        "torch._inductor.fx_passes.fuse_attention",
        "torch._inductor.fx_passes.mkldnn_fusion",
        "torch._inductor.fx_passes.pad_mm",
        "torch.export._trace",
        "sympy.physics.units.dimensions",
        "sympy.tensor.tensor",
    ),
}


class VllmEngineKind:
    name = "vllm"
    needs_model = True

    def preload(self) -> None:
        os.environ.update(vllm_plan.offline())
        # More would start the threads of OpenMP's pool, and only one thread can be forked.
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            import_vllm()
        except MachineError as exc:  # a worker tells its owner
            log.warning("%s", exc)
            return
        for module in PRELOADED + PRELOADED_FOR[vllm_plan.built_for()]:
            try:
                importlib.import_module(module)
            except Exception as exc:  # it is for speed only: who needs it will fail, and say so
                log.info("not preloaded: %s (%s: %s)", module, type(exc).__name__, exc)
        if vllm_plan.built_for() == "cuda":
            compilers.hash_sources()
        end_nvml()

    def check(self, spec: WorkerSpec) -> None:
        vllm_plan.check_backend(spec)
        vllm_plan.check_options(spec)
        if spec.model_dir:
            vllm_plan.arguments(spec, this_machine())

    @asynccontextmanager
    async def open(
        self, spec: WorkerSpec, *, run_dir: str, progress: Progress
    ) -> AsyncGenerator[Engine, None]:
        if not spec.model_dir:
            raise BadInputError(
                f"{spec.model!r} is not a directory with config.json",
                hint="rbee-keeper model list",
            )
        machine = this_machine()
        argv = vllm_plan.arguments(spec, machine)
        os.environ.update(vllm_plan.environment(spec, run_dir))
        os.environ[weights.VARIABLE] = str(Path(run_dir) / "weights")
        tempfile.tempdir = run_dir
        async with open_aio(name="vllm") as aio:
            steps = Steps(progress, Path(os.environ[weights.VARIABLE]))

            def report(text: str) -> None:
                aio.token.run_sync_soon(steps.tell, text)

            loader = Loader(argv, report, threads(machine), CLOSE[spec.backend])
            try:
                loaded = await steps.follow(aio.spawn(loader.load))
            except BaseException:
                kill_children()
                raise
            engine = VllmEngine(aio, loaded)
            try:
                yield engine
            finally:
                # Cleanup: bounded by vLLM's own limit, then by ours.
                with trio.move_on_after(CLOSE[spec.backend] + 1, shield=True):
                    await aio.call(loader.close)


@attrs.define(eq=False)
class Steps:
    """What the loading is at: told by the loader, and by the engine process while it starts."""

    progress: Progress
    weights: Path
    _loader_says: str = ""
    _read: bool = False

    def tell(self, text: str) -> None:
        self._loader_says = text
        self.progress(text)

    async def follow(self, loading: AioTask[Loaded]) -> Loaded:
        """Return what is loaded; cancelling ends the loading."""
        try:
            while True:
                with trio.move_on_after(LOOK):
                    return await loading.wait()
                self._look()
        finally:
            await loading.aclose()

    def _look(self) -> None:
        if self._loader_says != STARTING:
            return
        share = weights.read_share(self.weights)
        if share is None:
            return
        self.progress("KV cache") if self._read else self.progress("weights", share)
        self._read = share >= 1


def hide_broken_packages() -> None:
    """Hide optional packages that cannot be imported; transformers would break on them.

    An index may bring a torchvision that was built for another torch than the one installed.
    """
    for name in OPTIONAL:
        if name in sys.modules or find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except Exception as exc:
            log.warning("%s cannot be imported and is left out: %s", name, exc)
            for part in [key for key in sys.modules if key.startswith(f"{name}.")]:
                del sys.modules[part]
            sys.modules[name] = None  # type: ignore[assignment]


def inspect_models_here() -> None:
    """Let vLLM look at a model's class in this process where it can, not in a program of its own.

    That program imports everything again (13 s of CPU at the first start of an architecture) and
    knows nothing of what is hidden here. vLLM starts it so that CUDA is not initialised.
    """
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform

    hidden = any(name in sys.modules and sys.modules[name] is None for name in OPTIONAL)
    if hasattr(registry, "_run_in_subprocess") and (hidden or current_platform.is_cpu()):
        registry._run_in_subprocess = lambda look: look()


def kill_children() -> None:
    """End what vLLM had started when its start failed or was given up."""
    for child in multiprocessing.active_children():
        if child.pid is not None:  # not reaped yet: nobody else can have its pid
            guard.send_signal(child.pid, guard.start_time(child.pid), signal.SIGKILL)


@attrs.frozen
class Loaded:
    llm: Any
    app: Any
    tokenizer: Any
    longest: int
    """Characters of the longest token: more than ``context`` times that never fits."""


@attrs.define(eq=False)
class Loader:
    """Runs in the asyncio thread, which ``AsyncLLM`` blocks while it loads."""

    argv: list[str]
    report: Callable[[str], None]
    threads: int
    closing: float
    _llm: Any = None

    async def load(self) -> Loaded:
        """Start the engine and build its HTTP API.

        Raises:
            BadInputError: vLLM refuses an argument or the model's configuration.
            MachineError: vLLM cannot be imported, or its engine process failed.
        """
        self.report("importing vLLM")
        modules = import_vllm()
        cache_settings(modules.envs, False)  # of an engine before this one
        modules.torch.set_num_threads(self.threads)
        self.report("config")
        args = self._parse(modules)
        config, options = self._configure(modules, args)
        self.report(STARTING)
        weights.count_weights()
        # The CPU platform sets it to `spawn` while it makes the configuration.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        self._llm = self._start(modules, config, options)
        pools.filling.wait()
        self.report("building the API")
        app = await self._build_app(modules, args)
        tokenizer = own_tokenizer(self._llm)
        longest = max(map(len, tokenizer.get_vocab()), default=1)
        cache_settings(modules.envs, True)
        return Loaded(self._llm, app, tokenizer, longest)

    async def _build_app(self, modules: Any, args: Any) -> Any:
        level = logging.getLogger().level
        tasks = await self._llm.get_supported_tasks()
        app = modules.build_app(args, tasks, self._llm.model_config)
        try:
            await modules.init_app_state(self._llm, app.state, args, tasks)
        except Exception as exc:
            if not is_refusal(exc):
                raise
            raise self._refused(exc) from exc
        app.state.server = SimpleNamespace(should_exit=False)  # its error handler ends a server
        logging.getLogger().setLevel(level)  # one of its extensions silences the whole process
        return app

    async def close(self) -> None:
        processes = engine_processes(self._llm)
        self._llm.shutdown(timeout=self.closing)
        for process in processes:  # the killed ones are not reaped yet
            process.join(1)

    def _parse(self, modules: Any) -> Any:
        parser = modules.make_arg_parser(modules.FlexibleArgumentParser())
        parser.allow_abbrev = False  # `--max-model` would pass the check of what rbee decides
        several = {
            name
            for action in parser._actions
            if action.nargs in ("+", "*")
            for name in action.option_strings
        }

        def refuse(message: str) -> None:
            raise refused(message, parser._option_string_actions)

        parser.error = refuse
        return parser.parse_args(spread_lists(self.argv, several))

    def _configure(self, modules: Any, args: Any) -> tuple[Any, Any]:
        context = modules.UsageContext.OPENAI_API_SERVER
        try:
            options = modules.AsyncEngineArgs.from_cli_args(args)
            return options.create_engine_config(context), options
        except Exception as exc:
            if not is_refusal(exc):
                raise
            raise self._refused(exc) from exc

    def _refused(self, exc: Exception) -> BadInputError:
        names = _blamed(exc)
        given = [name for name in names if any(w.startswith(f"--{name}") for w in self.argv)]
        return BadInputError(
            f"vLLM refuses this model or configuration: {_first_lines(exc)}",
            hint="".join(f"{infer()}   # without --engine-arg {name}" for name in given[:1]),
        )

    def _start(self, modules: Any, config: Any, options: Any) -> Any:
        try:
            return modules.AsyncLLM.from_vllm_config(
                config,
                usage_context=modules.UsageContext.OPENAI_API_SERVER,
                disable_log_stats=options.disable_log_stats,
            )
        except Exception as exc:
            raise MachineError(
                f"vLLM's engine process failed while loading: {_first_lines(exc)}; "
                "its log above says why",
                code="engine_failed",
            ) from exc


def own_tokenizer(llm: Any) -> Any:
    """Return a tokenizer for our thread: vLLM's own where any thread may use it."""
    tokenizer = llm.get_tokenizer()
    return tokenizer if pools.is_pool(tokenizer) else copy.deepcopy(tokenizer)


def cache_settings(envs: Any, on: bool) -> None:
    """Have vLLM read its environment once or each time: it does so several times per token."""
    name = "enable_envs_cache" if on else "disable_envs_cache"
    if change := getattr(envs, name, None):
        change()


def is_refusal(exc: Exception) -> bool:
    """Tell what vLLM does not take from a bug; its own errors are no ValueErrors."""
    return isinstance(exc, REFUSALS) or type(exc).__name__.startswith("VLLM")


def _first_lines(exc: Exception) -> str:
    """Return the telling part of an error."""
    if callable(errors := getattr(exc, "errors", None)):  # pydantic's, which tell a lot more
        return "; ".join(dict.fromkeys(map(_told, errors())))
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return " ".join(lines[:3])[:500] or type(exc).__name__


def _told(error: Mapping[str, Any]) -> str:
    """Return what one of pydantic's errors says, and of which option."""
    text = str(error["msg"]).strip().partition("\n")[0].removeprefix("Value error, ")
    name = _option_name(error)
    return f"{name}: {text}, got {error.get('input')!r}" if name else text


def _blamed(exc: Exception) -> list[str]:
    """Return the options that an error names."""
    errors = getattr(exc, "errors", None)
    found = errors() if callable(errors) else [{"loc": (getattr(exc, "parameter", None) or "",)}]
    return [name for error in found if (name := _option_name(error))]


def _option_name(error: Mapping[str, Any]) -> str:
    where = error.get("loc") or ("",)
    return str(where[0]).replace("_", "-")


def end_nvml() -> None:
    """Close what vLLM's look at the cards has left open: a forked worker begins anew."""
    nvml = sys.modules.get("vllm.third_party.pynvml") or sys.modules.get("pynvml")
    for _ in range(16 if nvml else 0):
        try:
            nvml.nvmlShutdown()  # type: ignore[union-attr]
        except Exception:  # there is no driver, or it is closed
            return


def import_vllm() -> SimpleNamespace:
    """Return what a worker needs of vLLM; raise `MachineError` if it cannot be imported."""
    hide_broken_packages()
    try:
        import torch
        from vllm import SamplingParams, envs
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM

        try:  # since 0.32
            from vllm.entrypoints.launchers.api_server.app_state import init_app_state
            from vllm.entrypoints.launchers.app import build_app
            from vllm.entrypoints.launchers.cli_args import make_arg_parser
        except ImportError:
            from vllm.entrypoints.openai.api_server import build_app, init_app_state
            from vllm.entrypoints.openai.cli_args import make_arg_parser
    except Exception as exc:  # a library of torch that is missing or another is an OSError, say
        why = f"{type(exc).__name__}: {exc}".partition("\n")[0]
        raise MachineError(
            f"vLLM cannot be imported: {why}",
            code="engine_missing",
            hint=install(vllm_plan.built_for()),
        ) from exc
    inspect_models_here()
    skip_processors()
    pools.fill_pools_late()
    if vllm_plan.built_for() == "cpu":
        do_without_amx()
    else:
        compilers.choose_tools()
    return SimpleNamespace(
        torch=torch,
        envs=envs,
        SamplingParams=SamplingParams,
        AsyncEngineArgs=AsyncEngineArgs,
        UsageContext=UsageContext,
        FlexibleArgumentParser=FlexibleArgumentParser,
        AsyncLLM=AsyncLLM,
        init_app_state=init_app_state,
        build_app=build_app,
        make_arg_parser=make_arg_parser,
    )


class VllmGeneration:
    """Chunks from the asyncio thread, all that have come since the last step at once."""

    def __init__(self, tokens_in: int, outbox: Outbox[Chunk | RbeeError]) -> None:
        self.tokens_in = tokens_in
        self._outbox = outbox
        self._error: RbeeError | None = None
        self._finished = False

    def __aiter__(self) -> AsyncIterator[list[Chunk]]:
        return self

    async def __anext__(self) -> list[Chunk]:
        if self._finished:
            raise StopAsyncIteration
        chunks: list[Chunk] = []
        for item in [] if self._error else await self._outbox.take():
            if isinstance(item, RbeeError):
                self._error = item
            else:
                chunks.append(item)
                self._finished = item.finish is not None
        if self._error is not None and not chunks:
            raise self._error
        return chunks


class VllmEngine:
    """A loaded model, used from trio."""

    def __init__(self, aio: Aio, loaded: Loaded) -> None:
        self.context: int = loaded.llm.model_config.max_model_len
        self.slots: int = loaded.llm.vllm_config.scheduler_config.max_num_seqs
        self.app: ASGIApp | None = AioApp(aio, loaded.app)
        self._aio = aio
        self._llm = loaded.llm
        self._tokenizer = loaded.tokenizer
        self._longest = loaded.longest
        # Without that vLLM takes no priority but 0; the queen has its own order before it.
        self._by_priority = loaded.llm.vllm_config.scheduler_config.policy == "priority"
        self._one_at_a_time = trio.CapacityLimiter(1)

    def running(self) -> int:
        return int(self._llm.output_processor.get_num_unfinished_requests())

    def metrics(self) -> str:
        from prometheus_client import REGISTRY, generate_latest

        return str(generate_latest(REGISTRY).decode())

    @asynccontextmanager
    async def generate(self, request: ExecuteRequest) -> AsyncGenerator[VllmGeneration, None]:
        tokens = await self._tokenize(request)
        limit = answer_budget(request.max_tokens, len(tokens), self.context)
        params = sampling_params(request, limit)
        outbox: Outbox[Chunk | RbeeError] = self._aio.outbox()
        # The caller may use an id again while the engine still forgets the first one.
        request_id = f"{request.job_id}-{secrets.token_hex(4)}"
        priority = request.priority if self._by_priority else 0
        task = self._aio.spawn(self._iterate, tokens, params, request_id, priority, outbox)
        try:
            yield VllmGeneration(len(tokens), outbox)
        finally:
            await task.aclose()

    async def _iterate(
        self,
        tokens: list[int],
        params: Any,
        request_id: str,
        priority: int,
        outbox: Outbox[Chunk | RbeeError],
    ) -> None:
        """Runs in the asyncio thread; cancelling it aborts the request."""
        from vllm import TokensPrompt

        prompt = TokensPrompt(prompt_token_ids=tokens)
        try:
            asking = self._llm.generate(prompt, params, request_id, priority=priority)
            async with aclosing(asking) as outputs:
                async for output in outputs:
                    await outbox.send(_chunk(output.outputs[0]))
        except asyncio.CancelledError:
            raise
        except Exception as exc:
            outbox.put(_translate(exc))

    async def _tokenize(self, request: ExecuteRequest) -> list[int]:
        text, has_specials = self._render(request)
        if len(text) > self.context * self._longest:
            raise BadInputError(
                f"the prompt has {len(text)} characters; a context of {self.context} tokens "
                f"holds at most {self.context * self._longest}",
                hint=shorter(self.context),
            )
        if len(text) < LONG_TEXT:
            return self._encode(text, not has_specials)
        return await trio.to_thread.run_sync(
            self._encode, text, not has_specials, limiter=self._one_at_a_time
        )

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def _render(self, request: ExecuteRequest) -> tuple[str, bool]:
        """Return the text, and whether it carries its special tokens already."""
        has_template = bool(getattr(self._tokenizer, "chat_template", None))
        if request.messages is None and (request.raw or not has_template):
            return request.prompt or "", False
        if not has_template:
            raise BadInputError(
                "this model has no chat template, so it takes no messages",
                hint="send a prompt instead of messages",
            )
        if request.messages is None:
            messages = [{"role": "user", "content": request.prompt or ""}]
        else:
            messages = [{"role": m.role, "content": m.content} for m in request.messages]
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as exc:  # templates raise what they like
            raise BadInputError(f"the chat template refuses the messages: {exc}") from exc
        return str(text), True

    async def wait_dead(self) -> str:
        while True:
            for process in engine_processes(self._llm):
                if process.exitcode is not None:
                    return f"the engine process {process.pid} ended with {_how(process.exitcode)}"
            if self._llm.errored:
                return "the engine reports that it is broken; its log says why"
            await trio.sleep(NOTICE)


def engine_processes(llm: Any) -> list[Any]:
    """Return vLLM's handles of the processes that hold the model."""
    manager = getattr(llm.engine_core.resources, "engine_manager", None)
    return list(getattr(manager, "processes", ()))


def _how(exitcode: int) -> str:
    return signal.Signals(-exitcode).name if exitcode < 0 else f"status {exitcode}"


def _chunk(output: Any) -> Chunk:
    finish = output.finish_reason
    if finish not in (None, "stop", "length"):
        raise PeerError(f"the engine ended the request: {finish}", code="engine")
    return Chunk(output.text, len(output.token_ids), finish)


def _translate(exc: Exception) -> RbeeError:
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(exc, RbeeError):
        return exc
    if isinstance(exc, EngineDeadError):
        return PeerError("the engine process has died", code="engine_died")
    if isinstance(exc, (ValueError, TypeError)):
        return BadInputError(f"vLLM refuses the request: {exc}")
    log.error("generation failed", exc_info=exc)
    cause = exc.__cause__ or exc
    return PeerError(f"the engine failed: {type(cause).__name__}: {cause}", code="engine")


def sampling_params(request: ExecuteRequest, max_tokens: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    given = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "seed": request.seed,
        "stop": list(request.stop) or None,
    }
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            output_kind=RequestOutputKind.DELTA,
            **{key: value for key, value in given.items() if value is not None},
        )
    except (ValueError, TypeError) as exc:
        raise BadInputError(f"vLLM refuses a parameter: {exc}") from exc
