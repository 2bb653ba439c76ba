"""The choice of device, dtype and thread count."""

import pytest
import torch

from slr_core.engine import Engine
from slr_core.engine.runner import device as devices
from slr_core.engine.runner.device import (
    cast_for_device,
    fastest_threads,
    load_reasoner,
    resolve_device,
    resolve_dtype,
)
from slr_core.errors import ConfigError
from tests import tiny

# -- device and dtype ------------------------------------------------------------------------------------


def test_auto_device(monkeypatch):
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert resolve_device() == resolve_device("auto") == device
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == "cpu"


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "cpu:-2"])
def test_unknown_device(device):
    with pytest.raises(ConfigError, match=f"device must be auto, cpu, cuda or cuda:N, got {device}"):
        resolve_device(device)


@pytest.mark.parametrize("device", ["cuda:99", "meta", torch.device("xpu:99")])
def test_unavailable_device(device):
    with pytest.raises(ConfigError, match=f"device {device} is not available here"):
        resolve_device(device)


def test_dtype_names():
    assert resolve_dtype("auto") is None
    assert resolve_dtype("bfloat16") is resolve_dtype(torch.bfloat16) is torch.bfloat16
    assert resolve_dtype(torch.float64) is torch.float64
    for dtype in ("bf16", "torch.float32", "", torch.int8):
        with pytest.raises(ConfigError, match=f"dtype must be one of auto, float32, bfloat16, float16, got {dtype}"):
            resolve_dtype(dtype)


@pytest.fixture(scope="module")
def half_folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("half") / "checkpoint")
    tiny.reasoner().to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("native", [True, False])
def test_auto_dtype_follows_the_processor(half_folder, native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    expected = torch.bfloat16 if native else torch.float32
    assert load_reasoner(half_folder, device="cpu").base.dtype == expected
    # A dtype given by name is used even if the processor does not compute it natively.
    for dtype in ("bfloat16", "float16", "float32", torch.float64):
        reasoner = load_reasoner(half_folder, device="cpu", dtype=dtype)
        assert reasoner.base.dtype == resolve_dtype(dtype)


def test_engine_takes_device_and_dtype(half_folder):
    with Engine.from_pretrained(half_folder, device="cpu", dtype="float32", threads=1) as engine:
        assert engine.reasoner.base.dtype == torch.float32
        assert engine.reasoner.device.type == "cpu"
    with pytest.raises(ConfigError, match="dtype must be one of"):
        Engine.from_pretrained(half_folder, dtype="half")
    with pytest.raises(ConfigError, match="device cuda:99 is not available"):
        Engine.from_pretrained(half_folder, device="cuda:99")


# -- threads ---------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_emulated_half_precision_is_cast_to_fp32(dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    made = tiny.reasoner().to(dtype)
    cast_for_device(made)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}


@pytest.mark.parametrize("feature", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_native_bf16_is_kept(feature, monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == feature)
    for dtype, expected in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ):
        made = tiny.reasoner().to(dtype)
        cast_for_device(made)
        assert made.base.dtype == expected


def test_fastest_count_is_chosen(threads, monkeypatch):
    now, seen = [0.0], []
    cost = {1: 4.0, 2: 3.0, 4: 1.0, 6: 2.0}
    monkeypatch.setattr(devices.time, "perf_counter", lambda: now[0])

    def run():
        seen.append(torch.get_num_threads())
        now[0] += cost[torch.get_num_threads()]

    assert fastest_threads(run, 6, rounds=1) == torch.get_num_threads() == 4
    assert seen == [1, 2, 4, 6] * 2


@pytest.mark.parametrize(
    ("cost", "chosen"),
    [
        ({1: 1.0, 2: 0.9, 4: 0.85}, 1),  # too little for so many
        ({1: 1.0, 2: 0.8, 4: 0.7}, 2),
        ({1: 1.0, 2: 0.9, 4: 0.5}, 4),
        ({1: 1.0, 2: 1.5, 4: 2.0}, 1),
    ],
)
def test_more_threads_need_a_speedup(threads, monkeypatch, cost, chosen):
    now = [0.0]
    monkeypatch.setattr(devices.time, "perf_counter", lambda: now[0])

    def run():
        now[0] += cost[torch.get_num_threads()]

    assert fastest_threads(run, 4) == chosen


def test_short_steps_are_repeated_and_times_logged(threads, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(devices.time, "perf_counter", lambda: now[0])

    def run():
        # For the first tenth of a second something else keeps the processors busy.
        slow = torch.get_num_threads() > 1 and now[0] < 0.1
        now[0] += 0.004 if slow else 0.002 / torch.get_num_threads()

    with caplog.at_level("INFO", logger="slr_core"):
        assert fastest_threads(run, 2) == 2
    assert now[0] >= devices.MIN_MEASURED_S
    assert "Using 2 threads (step time: 2.0 ms with 1, 1.0 ms with 2)" in caplog.text


def test_one_thread_is_not_measured(threads):
    ran = []
    assert fastest_threads(lambda: ran.append(1), 1) == torch.get_num_threads() == 1
    assert not ran
