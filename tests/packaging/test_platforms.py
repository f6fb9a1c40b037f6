"""Guards for systems that these tests do not run on: Windows has no fork, fcntl or default UTF-8, Apple's MPS no float64."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from tests.fit import tiny as small
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deltatune.backbone.load import Backbone
from deltatune.compose.expression import parse
from deltatune.data.task import Task
from deltatune.delta.adapted import adapt
from deltatune.delta.blend import blend, to_lora
from deltatune.delta.delta import Delta
from deltatune.delta.merge import merge
from deltatune.laws.families import inputs, tiny
from deltatune.laws.subject import moved
from deltatune.training.fit import fit_plans

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
# Modules of Unix alone, and `multiprocessing`, whose processes begin differently on every system.
MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "crypt", "multiprocessing"}
CALLS = {
    "os": {
        "fork", "forkpty", "getuid", "geteuid", "getgid", "getpgid", "killpg", "setsid", "sched_getaffinity", "uname",
        "getloadavg", "nice", "mkfifo", "chown", "statvfs", "sysconf", "pread", "pwrite",
    },
    "signal": {"SIGKILL", "SIGHUP", "SIGUSR1", "SIGALRM", "alarm", "pause", "setitimer"},
    "time": {"tzset"},
}  # fmt: skip


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def nodes(kind: type[ast.AST]) -> Iterator[tuple[Path, Any]]:
    return ((file, node) for file in SOURCES for node in ast.walk(tree(file)) if isinstance(node, kind))


def _value(node: ast.expr) -> Any:
    return node.value if isinstance(node, ast.Constant) else None


def test_nothing_of_one_system_alone_is_imported_or_called() -> None:
    named = [(file, alias.name) for file, node in nodes(ast.Import) for alias in node.names]
    named += [(file, node.module or "") for file, node in nodes(ast.ImportFrom)]
    assert len(named) > 500
    assert [one for one in named if MODULES & set(one[1].split("."))] == []
    used = [(f, n.value.id, n.attr) for f, n in nodes(ast.Attribute) if isinstance(n.value, ast.Name)]
    assert [one for one in used if one[2] in CALLS.get(one[1], ())] == []


def test_every_text_file_is_read_and_written_in_utf_8() -> None:
    found = 0
    for file, node in nodes(ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(getattr(node.func, "value", None), "id", "")
        mode = next((a.value for a in node.args if isinstance(a, ast.Constant) and re.fullmatch("[rwab+]+", str(a.value))), "r")  # fmt: skip
        # os.open takes flags, and a picture is bytes.
        if name not in ("open", "read_text", "write_text") or owner in ("os", "Image") or "b" in mode:
            continue
        found += 1
        assert any(k.arg == "encoding" for k in node.keywords) or "utf-8" in map(_value, node.args), (
            f"{file}:{node.lineno} leaves the encoding to the system"
        )
    assert found > 10


def test_the_matrix_of_the_ci_names_the_systems_and_says_that_it_is_untested() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert text.startswith("# Untested")
    assert "os: [ubuntu-latest, macos-latest, windows-latest]" in text


def test_what_is_flushed_to_the_disk_is_open_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows refuses to flush a file that is open for reading."""
    flushed: list[int] = []
    flush = os.fsync

    def strict(number: int) -> None:
        os.write(number, b"")  # refused for a file that is open for reading
        flushed.append(number)
        flush(number)

    monkeypatch.setattr(os, "fsync", strict)
    (trained,) = fit_plans(small.backbone(), [small.plan("lora(r=2)")], folder=tmp_path)
    kept = len(flushed)
    trained.delta.save(str(tmp_path / "out"))
    assert kept > 0 and len(flushed) == kept + 2


def _in_a_process_of_its_own(number: int, delta: Delta, folder: str) -> None:
    with adapt(Backbone(tiny("bert")), delta) as adapted, torch.no_grad():
        torch.save(adapted(**inputs("bert"))[0], Path(folder) / "there.pt")


def test_a_delta_goes_into_a_spawned_process(tmp_path: Path) -> None:
    """Windows and macOS begin processes afresh, so what goes there is pickled."""
    backbone = Backbone(tiny("bert"))
    delta = moved(Delta.build(parse("lora(r=2) | adapter(m=3)"), backbone, name="a"))
    mp.spawn(_in_a_process_of_its_own, (delta, str(tmp_path)), nprocs=1)
    with adapt(backbone, delta) as adapted, torch.no_grad():
        here = adapted(**inputs("bert"))[0]
    assert torch.equal(torch.load(tmp_path / "there.pt"), here)


MPS, HERE = torch.device("mps"), torch.device("cpu")


class OnMPS(Tensor):
    """A tensor that stands for one on Apple's device: whatever is computed from it is one, too, until it is fetched.

    It refuses what the device refuses: float64, and being read as an array of numpy without being fetched.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return MPS
        if func is Tensor.numpy:
            raise TypeError("can't convert an mps tensor to numpy")
        result = super().__torch_function__(func, types, args, kwargs or {})
        target = {*map(str, args[1:]), *map(str, (kwargs or {}).values())}
        if func is Tensor.cpu or (func is Tensor.to and "cpu" in target):
            return result.as_subclass(Tensor)
        if isinstance(result, OnMPS) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return result


class Device(TorchFunctionMode):
    """What is made on the device, or sent there, becomes its stand-in."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if not any(map(_is_device, (*args, given.get("device")))):
            return func(*args, **given)
        given = {name: HERE if _is_device(value) else value for name, value in given.items()}
        # Sent as a plain tensor, so that being sent there is not taken for being fetched.
        plain = [a.as_subclass(Tensor) if isinstance(a, OnMPS) else HERE if _is_device(a) else a for a in args]
        result = func(*plain, **given)
        return result.as_subclass(OnMPS).clone() if isinstance(result, Tensor) else result


def _is_device(value: object) -> bool:
    return isinstance(value, torch.device) and value == MPS


def there(module: nn.Module) -> nn.Module:
    """Put a module's parameters on the stand-in of the device."""
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.detach().as_subclass(OnMPS), parameter.requires_grad)
    return module


def test_the_stand_in_refuses_what_the_device_refuses() -> None:
    x = torch.ones(2).as_subclass(OnMPS)
    for wrong in (lambda: (x + 1).double(), lambda: (x * 2).to(torch.float64), lambda: (x @ x).numpy()):
        with pytest.raises(TypeError, match=r"MPS|mps"):
            wrong()
    assert (x + 1).cpu().double().dtype == torch.float64
    assert (x + 1).device == MPS
    with Device():
        assert isinstance(torch.ones(2, device=MPS), OnMPS) and isinstance(torch.ones(2).to(x.device), OnMPS)
        with pytest.raises(TypeError, match="MPS"):
            torch.ones(2, dtype=torch.float64, device=x.device)


def numbers() -> Task:
    rows = [{"text": row["text"], "value": float(len(row["label"]))} for row in small.task().train]
    return Task("numbers", "regression", "pearson", rows[:20], rows[20:30], rows[30:], (), source="made here")


def sets() -> Task:
    rows = [{"text": row["text"], "labels": [row["label"]]} for row in small.task().train]
    known = ("bad", "fine", "good")
    return Task("sets", "multi_label", "micro_f1", rows[:20], rows[20:30], rows[30:], known, source="made here")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [small.task, numbers, sets, lambda: small.task("token_classification"), lambda: small.task("multiple_choice"),
     lambda: small.task("extractive_span")],
)  # fmt: skip
def test_a_fit_asks_nothing_of_mps_that_it_refuses(make: Callable[[], Task], tmp_path: Path) -> None:
    backbone = small.backbone()
    there(backbone.module)
    plan = small.plan("lora(r=2) | prefix(n=2)", make(), steps=4, evaluations=2)
    with Device():
        (trained,) = fit_plans(backbone, [plan])
        assert isinstance(backbone.module(**inputs("bert"))[0], OnMPS)
    assert trained.metrics["test"]
    trained.delta.save(str(tmp_path / "out"))


def test_merging_and_blending_ask_nothing_of_mps_that_it_refuses() -> None:
    backbone = small.backbone()
    there(backbone.module)
    with Device():
        deltas = [moved(Delta.build(parse("lora(r=2)"), backbone, seed=seed, name=str(seed))) for seed in (0, 1)]
        for how in ("ties", "dare", "della", "breadcrumbs"):
            blend([there(delta) for delta in deltas], backbone, how, rank=2)  # type: ignore[misc]
        to_lora(deltas[0], backbone, energy=0.9)
        merge(backbone, deltas[0]).unmerge()
        assert deltas[0].norms()
