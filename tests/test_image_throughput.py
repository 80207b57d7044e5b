"""FLOPs and utilization of a known layer and of a job; accelerate's launch configs, and the ones that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from test_image_source import folder, job, start  # noqa: F401  # the fixture is used by name

from diffalign.cli import launch
from diffalign_image.throughput import Utilization

CONFIGS = Path(__file__).parents[1] / "configs" / "accelerate"


def test_a_linear_layer_has_two_flops_a_weight_and_row_forward_and_four_backward() -> None:
    """[5, 7] x [7, 11]: forward 2 x 5 x 7 x 11; backward the same for the weights and again for the input."""
    layer, x = torch.nn.Linear(7, 11, bias=False), torch.randn(5, 7, requires_grad=True)
    used = Utilization(1e-9)  # 1,000 FLOP/s
    with used.counting():
        layer(x).sum().backward()
    assert used.flops == 3 * 2 * 5 * 7 * 11
    with used.counting():
        layer(x)  # counted once only
    assert used.flops == 2310
    assert used.of(2.0) == pytest.approx({"tflops": 2310e-12, "mfu": 2310 / 2.0 / 1000})


def test_without_a_known_peak_nothing_is_counted_or_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, peak in (("NVIDIA H200", 989.4), ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", None),
                       ("NVIDIA H100 NVL", None), ("NVIDIA A10G", None)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert Utilization(None).peak_tflops == peak
    monkeypatch.undo()
    if not torch.cuda.is_available():
        used = Utilization(None)
        with used.counting():
            torch.nn.Linear(2, 2)(torch.ones(1, 2))
        assert used.flops is None
        assert used.of(1.0) == {}


def test_a_job_reports_its_utilization(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    made = start(tmp_path / "run", job(folder, "sd3", 2, peak_tflops=1e-6)).path
    records = [json.loads(line) for line in (made / "throughput.jsonl").read_text().splitlines()]
    work = [record["mfu"] * record["iteration_ms"] for record in records]  # the same FLOPs whatever the time
    assert work[0] > 0
    assert work[1] == pytest.approx(work[0], rel=1e-2)
    with pytest.raises(ValueError, match=r"peak_tflops must be positive or null, got 0"):
        job(folder, "sd3", 2, peak_tflops=0.0)


@pytest.mark.parametrize(("name", "machines", "processes"), [("ddp", 1, 8), ("ddp_two_machines", 2, 16)])
def test_accelerate_reads_the_launch_configs(name: str, machines: int, processes: int) -> None:
    found = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert isinstance(found, ClusterConfig)
    assert found.distributed_type == "MULTI_GPU"
    assert (found.num_machines, found.num_processes, found.mixed_precision) == (machines, processes, "no")
    assert not found.fsdp_config
    assert not found.deepspeed_config
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == {"ddp", "ddp_two_machines"}


@pytest.mark.parametrize(("variable", "name", "shards"), [
    ("ACCELERATE_USE_FSDP", "FSDP", False), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed", False),
    ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed", True)])
def test_a_launcher_that_would_shard_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str, name: str,
                                                          shards: bool) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=rf"told to use {name}.*(configs/accelerate/ddp.yaml.*model\.shard: true|"
                                         r"model\.shard: true.*configs/accelerate/ddp.yaml)"), \
            launch.processes("image_finetune", shards=shards):
        pass
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        with launch.processes("image_finetune", shards=True):
            pass
    monkeypatch.setenv(variable, "false")
    with launch.processes("image_finetune"):
        pass
