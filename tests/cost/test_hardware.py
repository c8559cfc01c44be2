"""Hardware sheets: sane, sourced, and open to sheets of one's own."""

from __future__ import annotations

import json

import pytest

import workbench as wb
from workbench.cost.hardware import ELEMENT_BYTES, HARDWARE, Hardware
from workbench.cost.rates import Grid, Rates

OWN = Hardware("mine", "A device of mine", {"fp32": 1e12}, 1e11, 10**9, 2**16, ("https://example.org/sheet",))


def test_every_device_asked_for_has_a_sheet():
    wanted = "a100-40 a100-80 h100-sxm h100-pcie h200 b200 l40s rtx-4090 mi300x ascend-910c m2-pro"
    assert list(HARDWARE) == wanted.split()


@pytest.mark.parametrize("name", HARDWARE)
def test_sheets_are_sane_and_sourced(name):
    sheet = wb.hardware(name)
    assert sheet.name == name and sheet.sources and all(source.startswith("https://") for source in sheet.sources)
    half = sheet.peak("fp16")
    # FLOPs a byte at which half precision turns from memory to compute: 34 (M2 Pro) to 419 (L40S) among these devices
    assert 30 <= sheet.ridge("fp16") <= 450
    assert 5e12 < half < 5e15 and 1e11 < sheet.bandwidth < 1e13
    assert 2e10 <= sheet.memory_bytes <= 2e11 and 2**15 <= sheet.on_chip_bytes <= 2**19
    for dtype, peak in sheet.peak_flops.items():
        assert peak <= half if ELEMENT_BYTES[dtype] >= 2 else peak >= half
    assert not sheet.rates


def test_dense_peaks_not_sparse_ones():
    assert wb.hardware("h100-sxm").peak("bf16") == 989.4e12  # the datasheet's 1,979 is with sparsity
    assert wb.hardware("b200").peak("fp8") == 4.5e15  # the datasheet's 9 PFLOP/s is with sparsity


def test_estimates_say_so():
    for name in ("ascend-910c", "m2-pro"):
        assert "estimated" in wb.hardware(name).note


def test_a_sheet_of_ones_own(tmp_path):
    assert wb.hardware(OWN) is OWN
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(OWN.to_dict()))
    assert wb.hardware(path) == wb.hardware(str(path)) == OWN


def test_a_measured_sheet_survives_json():
    grid = Grid(((1.0, 4.0), (2.0,)), (10.0, 40.0))
    rates = Rates(grid, grid, {"add": grid}, {"causal": grid}, step_s=0.5, layer_s=0.25, slowdown=grid)
    sheet = Hardware("m", "m", {"fp32": 1.0}, 1.0, 1, 1, (), rates={"fp32": rates}, environment={"processor": "x"})
    assert Hardware.from_dict(json.loads(json.dumps(sheet.to_dict()))) == sheet


def test_grid_interpolates_in_logs_and_holds_beyond():
    grid = Grid(((1.0, 4.0), (1.0, 100.0)), (1.0, 10.0, 4.0, 40.0))
    assert grid(1, 1) == pytest.approx(1) and grid(4, 100) == pytest.approx(40)
    assert grid(2, 1) == pytest.approx(2)  # halfway in logs from 1 to 4
    assert grid(2, 10) == pytest.approx(2 * 10**0.5)
    assert grid(0.1, 1e6) == pytest.approx(10) and grid([1, 64], 1).tolist() == pytest.approx([1, 4])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "is not JSON"),
        ("[1]", "holds no JSON object"),
        ("{}", "lacks 'bandwidth'"),
        (json.dumps({**OWN.to_dict(), "colour": 1}), "unknown field 'colour'"),
        (json.dumps({**OWN.to_dict(), "bandwidth": 0}), "bandwidth=0"),
        (json.dumps({**OWN.to_dict(), "peak_flops": {"fp32": -1}}), "fp32=-1"),
        (json.dumps({**OWN.to_dict(), "peak_flops": {"fp7": 1}}), "a peak for 'fp7'"),
        (json.dumps({**OWN.to_dict(), "peak_flops": {}}), "a peak for nothing"),
        (json.dumps({**OWN.to_dict(), "bandwidth": "fast"}), "of the wrong kind"),
        (json.dumps({**OWN.to_dict(), "peak_flops": 3}), "of the wrong kind"),
    ],
)
def test_a_bad_sheet_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "sheet.json"
    path.write_text(text)
    with pytest.raises(wb.UserError, match=message):
        wb.hardware(path)


def test_unknown_names(tmp_path, monkeypatch):
    with pytest.raises(wb.UserError, match=r"no hardware named 'h1000'; known are a100-40, .*this-machine"):
        wb.hardware("h1000")
    with pytest.raises(wb.UserError, match="Cannot read the hardware sheet"):
        wb.hardware(tmp_path / "none.json")
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    with pytest.raises(wb.UserError, match="run `workbench doctor --calibrate`"):
        wb.hardware("this-machine")
