"""The whole network in DistributedDataParallel, as it is wrapped by default."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

STEPS, RANKS = 3, 2


def train(rank: int, folder: str, every_gradient: bool) -> None:
    from tests.models.network_support import Pyramid
    from xattn_models import SCAMTL

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=RANKS
    )
    try:
        torch.manual_seed(0)
        network = SCAMTL(Pyramid(), ("semseg", "depth"), {"semseg": 5, "depth": 1})
        if every_gradient:
            network.requires_grad_(True)
        model = DistributedDataParallel(network)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(rank)
        for _ in range(STEPS):
            optimiser.zero_grad()
            output = model(torch.randn(2, 3, 64, 64, generator=generator))
            loss = sum(output[task].square().mean() for task in ("semseg", "depth"))
            for scale in output["deep_supervision"].values():
                loss = loss + sum(y.square().mean() for y in scale.values())
            loss.backward()
            optimiser.step()
        values = torch.cat([p.detach().flatten() for p in network.parameters()])
        others = [torch.empty_like(values) for _ in range(RANKS)]
        dist.all_gather(others, values)
        assert torch.equal(*others) and values.isfinite().all()
        with torch.no_grad():
            image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(9))
            output = network.eval()(image)["depth"]
            outputs = [torch.empty_like(output).contiguous() for _ in range(RANKS)]
            dist.all_gather(outputs, output.contiguous())
    finally:
        dist.destroy_process_group()


def test_trains_without_special_flags(tmp_path: Path) -> None:
    mp.spawn(train, (str(tmp_path), False), nprocs=RANKS)


def test_trains_when_every_parameter_requires_a_gradient(tmp_path: Path) -> None:
    mp.spawn(train, (str(tmp_path), True), nprocs=RANKS)
