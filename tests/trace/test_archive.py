"""Traces as zip files: a round trip, and one sentence for whatever a stranger may upload."""

from __future__ import annotations

import io
import json
import pickle
import stat
import tempfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import workbench as wb
from workbench.testing import ids, random_qwen_moe
from workbench.trace.archive import Limits, read_zip, zip_of
from workbench.trace.schema import TABLES
from workbench.trace.soundness import checked

HTML = "<img src=x onerror=alert(1)>\x1b[31m"


@pytest.fixture(scope="module")
def trace(tiny) -> wb.Trace:
    session = wb.Session(wb.load((random_qwen_moe(), tiny.tokenizer)), wb.H2O(budget=8), importance="window")
    session.prefill([1 + number % 90 for number in range(20)])
    session.generate(3, stop_at_end=False)
    return session.trace


@pytest.fixture(scope="module")
def zipped(trace) -> bytes:
    return zip_of(trace)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path_factory, monkeypatch):
    """No file stays behind, in the temporary folder or beside it."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert not list(folder.iterdir())


def remade(zipped: bytes, change=lambda name, data: data, **added: bytes) -> bytes:
    """The zip with its files changed, and some added."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(zipped)) as before, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as after:
        for name in before.namelist():
            data = change(name, before.read(name))
            if data is not None:
                after.writestr(name, data)
        for name, data in added.items():
            after.writestr(name, data)
    return out.getvalue()


def with_meta(zipped: bytes, **entries: object) -> bytes:
    def change(name: str, data: bytes) -> bytes:
        return json.dumps({**json.loads(data), **entries}).encode() if name == "meta.json" else data

    return remade(zipped, change)


def with_table(zipped: bytes, name: str, table: pa.Table, **options: object) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return remade(zipped, lambda path, data: None if path.startswith(f"{name}/") else data, **{_part(name): out.getvalue()})


def _part(name: str) -> str:
    return f"{name}/part-000000.parquet"


def refusal(data: bytes, limits: Limits | None = None) -> str:
    with pytest.raises(wb.UserError) as raised:
        read_zip(data, limits)
    said = str(raised.value)
    assert said.endswith(".") and len(said.splitlines()) == 1 and "\x1b" not in said
    return said


def test_round_trip(trace, zipped):
    loaded = read_zip(zipped)
    assert all(loaded.arrow(name).equals(trace.arrow(name)) for name in TABLES)
    assert loaded.anatomy == trace.anatomy and loaded.setup == trace.setup
    assert zip_of(loaded) == zipped


def test_a_folder_that_was_zipped_by_hand_and_a_recording_open_too(trace, zipped):
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(zipped)) as before, zipfile.ZipFile(out, "w") as after:
        after.mkdir("run.trace")
        after.mkdir("run.trace/steps")
        for name in before.namelist():
            after.writestr(f"run.trace/{name}", before.read(name))
        after.writestr("run.trace/recording.safetensors", b"tensors, which a trace does without")
    assert read_zip(out).arrow("steps").equals(trace.arrow("steps"))


@pytest.mark.parametrize(
    "name",
    [
        "../meta.json",
        "/etc/evil",
        "run/../../evil",
        "..",
        "steps/../../x",
        "C:\\evil",
        "a/b/meta.json",
        "evil.py",
        "steps/a.pkl",
    ],
)
def test_a_zip_that_climbs_or_holds_other_files_is_refused(zipped, name):
    assert "which no trace has" in refusal(remade(zipped, **{name: b"x"}))


def test_a_link_is_refused(zipped):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        link = zipfile.ZipInfo("meta.json")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    assert "which no trace has" in refusal(out.getvalue())


def test_no_zip_a_cut_one_and_one_without_a_trace(zipped):
    for data in (b"", b"no zip", zipped[: len(zipped) // 2], pickle.dumps(Path("/")), zipped.replace(b"PAR1", b"PAR2")):
        assert "zip" in refusal(data)
    assert "no trace" in refusal(remade(zipped, lambda name, data: None if name == "meta.json" else data))
    assert "more than one" in refusal(remade(zipped, **{f"other/{_part('device')}": b""}))


def test_a_bomb_is_refused_whatever_its_sizes_say(zipped):
    bomb = remade(zipped, **{_part("routing").replace("0.p", "9.p"): bytes(50_000_000)})
    assert len(bomb) < 200_000 and "unpacks to more than" in refusal(bomb)
    assert "unpacks to more than" in refusal(zipped, Limits(unzipped_bytes=1000))
    assert "at most 1,000 are taken" in refusal(zipped, Limits(zip_bytes=1000))
    assert "at most 3" in refusal(zipped, Limits(files=3))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_way_of_packing_that_swells_within_one_read_is_refused_before_it_is_unpacked(zipped, method):
    out = io.BytesIO(zipped)
    with zipfile.ZipFile(out, "a", method) as archive:
        archive.writestr(_part("routing").replace("0.p", "9.p"), bytes(50_000_000))
    assert len(out.getvalue()) < len(zipped) + 20_000 and "with deflate" in refusal(out.getvalue())


def test_a_table_that_swells_in_memory_is_refused_before_it_is_read(zipped):
    rows = 200_000
    nulls = pa.table([pa.nulls(rows, field.type) for field in TABLES["cache"]], schema=TABLES["cache"])
    swelling = with_table(zipped, "cache", nulls)
    assert len(swelling) < 100_000 and "more than 1,000,000 values" in refusal(swelling, Limits(values=1_000_000))
    long = pa.table({"step": [0] * 1000, "module": ["x" * 10_000] * 1000, "flops": [1] * 1000}, TABLES["unattributed"])
    repeated = with_table(zipped, "unattributed", long)
    assert len(repeated) < 100_000 and "bytes of text" in refusal(repeated, Limits(text_bytes=9_000_000))


@pytest.mark.parametrize(
    "entries",
    [
        {"anatomy": {}},
        {"anatomy": None},
        {"anatomy": [1]},
        {"setup": {"a": 1}},
        {"notes": "a note"},
        {"notes": [1]},
        {"swaps": [{"to": 3}]},
        {"swaps": 3},
        {"unfinished_steps": 7},
    ],
)
def test_a_meta_of_other_kinds_is_refused(zipped, entries):
    assert "meta.json" in refusal(with_meta(zipped, **entries))


def test_an_anatomy_with_other_sizes_is_refused(trace, zipped):
    anatomy = trace.anatomy.to_dict()
    layer = anatomy["layers"][0]
    for wrong in (
        {**anatomy, "element_bytes": -2},
        {**anatomy, "hidden_size": "8"},
        {**anatomy, "num_parameters": 2**70},
        {**anatomy, "layers": []},
        {**anatomy, "layers": [{**layer, "index": 5}]},
        {**anatomy, "layers": [{**layer, "attention": {**layer["attention"], "num_kv_heads": 0}}]},
        {**anatomy, "class_name": 3},
    ):
        assert "meta.json" in refusal(with_meta(zipped, anatomy=wrong))
    for damaged in (b"[]", b"null", b"\xff", b"{" * 100_000, b'{"format_version": 3}'):
        assert "trace" in refusal(remade(zipped, lambda name, data, new=damaged: new if name == "meta.json" else data))


def test_tables_of_other_types_or_with_impossible_numbers_are_refused(trace, zipped):
    assert "damaged" in refusal(with_table(zipped, "steps", pa.table({"step": ["a"], "phase": [1]})))
    assert "damaged" in refusal(remade(zipped, **{_part("device"): b"no parquet"}))
    steps, evictions = trace.arrow("steps"), trace.arrow("evictions")

    def put(table: pa.Table, column: str, value: object) -> pa.Table:
        place = table.schema.get_field_index(column)
        return table.set_column(place, table.schema.field(place), pa.array([value] * len(table), table.schema.types[place]))

    for name, table, column, value in (
        ("steps", steps, "phase", HTML),
        ("steps", steps, "step", 0),
        ("steps", steps, "phase", None),
        ("steps", steps, "batch", -1),
        ("evictions", evictions, "layer", 3),
        ("evictions", evictions, "position", 2**60),
    ):
        assert f"table '{name}'" in refusal(with_table(zipped, name, put(table, column, value)))


def test_experts_that_a_layer_does_not_have_are_refused(tiny):
    session = wb.Session(wb.load((random_qwen_moe(), tiny.tokenizer)), routing="logits")
    session.prefill([3, 4, 5])
    trace = session.trace
    assert checked(trace) is trace
    routing, choices = trace.arrow("routing").to_pydict(), trace.arrow("choices").to_pydict()
    for name, columns, change, said in (
        ("routing", routing, {"expert": [6] * len(routing["expert"])}, "expert 6"),
        ("choices", choices, {"experts": [[0, 6]] * len(choices["experts"])}, "experts 6"),
        ("choices", choices, {"experts": [[0, -2]] * len(choices["experts"])}, "experts -2"),
        ("choices", choices, {"weights": [[0.5]] * len(choices["experts"])}, "lacks experts or weights"),
        ("choices", choices, {"experts": [None] * len(choices["experts"])}, "lacks experts or weights"),
        ("choices", choices, {"logits": [[0.5]] * len(choices["experts"])}, "not one logit an expert"),
    ):
        table = pa.table({**columns, **change}, schema=trace.arrow(name).schema)
        with pytest.raises(wb.UserError, match=said):
            checked(wb.Trace(trace.meta, {each: table if each == name else trace.arrow(each) for each in TABLES}))


def test_texts_that_hold_html_stay_texts(trace, zipped):
    tokens = trace.arrow("tokens")
    place = tokens.schema.get_field_index("text")
    texts = tokens.set_column(place, tokens.schema.field(place), pa.array([HTML] * len(tokens)))
    loaded = read_zip(with_meta(with_table(zipped, "tokens", texts), setup=HTML, notes=[HTML]))
    assert loaded.setup == HTML and set(loaded.table("tokens")["text"]) == {HTML}
    assert "<img" not in loaded._repr_html_()


def test_what_this_package_writes_is_sound(trace):
    assert checked(trace) is trace
    moe = random_qwen_moe()
    with wb.profile(moe, importance="full") as prof:
        moe.generate(ids(20, 2), max_new_tokens=3, do_sample=False)
    profiled = prof.trace
    assert checked(profiled) is profiled
    assert checked(wb.Trace.merge({"a": trace, "b": trace}).select(steps=range(0))).arrow("steps").num_rows == 0
