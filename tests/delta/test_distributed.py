"""Two processes on the CPU: data parallel, and a backbone whose weights are sharded, beside one process."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tests.delta.test_merge import given
from tests.fit.tiny import backbone
from torch import Tensor, nn

from deltatune.compose.expression import parse
from deltatune.delta.adapted import Adapted
from deltatune.delta.delta import Delta
from deltatune.laws.subject import moved

WORLD = 2
SPECS = ("lora(r=2) | bitfit", "adapter(m=3)", "prefix(n=2)", "dora(r=2) | oft(b=8) | vera(r=4)")
pytestmark = pytest.mark.skipif(not dist.is_available() or os.name == "nt", reason="needs gloo and processes")


def adapted(text: str) -> Adapted:
    on = backbone("bert", torch.float64)
    return Adapted(on, [moved(Delta.build(parse(text), on, name="a").to(torch.float64))])


def loss(model: nn.Module, rows: slice) -> Tensor:
    whole = given(backbone())
    batch = {name: value[rows] for name, value in whole.items()}
    out = model(**batch).last_hidden_state
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn((len(whole["input_ids"]), *out.shape[1:]), generator=draw, dtype=out.dtype)[rows]
    total: Tensor = (out * weight).sum()
    return total


def gradients(model: Adapted) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.bank.named_parameters() if p.grad is not None}


def together(work: Callable[[str], object], rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        torch.save({text: work(text) for text in SPECS}, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def two(work: Callable[[str], object], folder: Path) -> list[dict[str, dict[str, Tensor]]]:
    """What each of two processes found for each spec."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_start, args=(work, port, str(folder)), nprocs=WORLD)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def _start(rank: int, work: Callable[[str], object], port: int, folder: str) -> None:
    together(work, rank, port, folder)


def check(work: Callable[[str], object], folder: Path, share: float = 1.0) -> None:
    """The gradients of one process, times a share, are what each of two has for every spec."""
    both = two(work, folder)
    for text in SPECS:
        model = adapted(text)
        loss(model, slice(None)).backward()
        whole = gradients(model)
        assert whole and all(value.any() for value in whole.values())
        for found in both:
            assert found[text].keys() == whole.keys()
            for name, value in whole.items():
                torch.testing.assert_close(found[text][name], value * share, rtol=1e-9, atol=1e-12)


def data_parallel(text: str) -> dict[str, Tensor]:
    model = adapted(text)
    parallel = nn.parallel.DistributedDataParallel(model)
    loss(parallel, slice(dist.get_rank(), None, WORLD)).backward()
    return gradients(model)


def test_data_parallel_gives_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    check(data_parallel, tmp_path, 1 / WORLD)  # their mean over the processes, of a sum


def sharded(text: str) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = adapted(text)
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.backbone.get_submodule("encoder.layer").children():
        fully_shard(block, mesh=mesh)
    fully_shard(model.backbone, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.backbone.parameters())
    assert not any(isinstance(p, DTensor) for p in model.bank.parameters())
    loss(model, slice(None)).backward()
    assert all(isinstance(p, DTensor) for p in model.backbone.parameters())
    return gradients(model)


def test_a_sharded_backbone_gives_the_gradients_of_a_whole_one(tmp_path: Path) -> None:
    check(sharded, tmp_path)
