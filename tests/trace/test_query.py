"""SQL over a trace: one SELECT that reads its tables and nothing else, in bounded time and memory if asked."""

from __future__ import annotations

import time

import pyarrow as pa
import pytest

import workbench as wb
from workbench.cost.plan import Plan
from workbench.models.anatomy import anatomy_of
from workbench.testing import random_llama
from workbench.trace.query import limited, query
from workbench.trace.schema import TABLES

OUTSIDE = pa.table({"secret": [1]})

NOT_A_SELECT = [
    "copy (select 1) to '{file}'",
    "attach '{file}'",
    "pragma database_list",
    "install httpfs",
    "load httpfs",
    "set threads = 2",
    "create table mine as select 1",
    "insert into steps select * from steps",
    "update steps set step = 1",
    "explain analyze select 1",
    "call pragma_version()",
    "prepare p as select 1",
    "begin",
    "export database '{file}'",
    "select 1; select 2",
    "select 1; copy (select 1) to '{file}'",
    "",
    "-- nothing",
]

OUT_OF_REACH = [
    "select * from read_csv('/etc/passwd')",
    "select * from read_text('/etc/passwd')",
    "select * from '/etc/passwd'",
    "select * from glob('/*')",
    "select * from read_parquet('http://127.0.0.1:9/a')",
    "select * from OUTSIDE",
    "select getenv('HOME')",
    "select * from duckdb_secrets()",
    "select nothing from nowhere",
    "select",
    "select * from steps where",
    "select 1/*",
    "select ?",
    "\x00",
    "select " + "(" * 4000 + "1" + ")" * 4000,
]


@pytest.fixture(scope="module")
def tables() -> dict[str, pa.Table]:
    trace, _ = Plan(anatomy_of(random_llama()), batch=1, context=8, new_tokens=20).trace()
    return {name: trace.arrow(name) for name in TABLES}


@pytest.mark.parametrize("text", NOT_A_SELECT)
def test_anything_but_one_select_is_refused_and_nothing_is_written(tables, text, tmp_path):
    with pytest.raises(wb.UserError, match=r"^The query failed: .*(one SELECT|only a SELECT).*\.$"):
        query(tables, text.format(file=tmp_path / "written"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", OUT_OF_REACH)
def test_files_network_variables_and_nonsense_are_out_of_reach(tables, text):
    with pytest.raises(wb.UserError, match=r"^The query failed: ") as refusal:
        query(tables, text)
    assert len(str(refusal.value).splitlines()) == 1 and "root:" not in str(refusal.value)


def test_reading_in_several_ways(tables):
    assert query(tables, "from steps select count(*) as n;")["n"].tolist() == [21]
    assert "steps" in query(tables, "show tables")["name"].tolist()
    assert query(tables, "describe steps")["column_name"].tolist()[0] == "step"


def test_a_limited_query_answers_as_an_unlimited_one(tables):
    text = (
        "select phase, count(*) as n, sum(tokens) as tokens, 1 as n, date '2020-01-01' as day from steps group by 1 order by 2"
    )
    answer = limited(tables, text)
    assert not answer.cut and answer.rows.columns.tolist() == ["phase", "n", "tokens", "n_2", "day"]
    assert answer.rows["n"].tolist() == query(tables, text)["n"].tolist()
    assert answer.rows["day"].tolist() == ["2020-01-01"] * 2 and answer.rows["tokens"].sum() == 28
    assert "steps" in limited(tables, "show tables").rows["name"].tolist()


def test_a_limited_query_gives_its_first_rows_and_says_so(tables):
    answer = limited(tables, "select step from steps order by step", max_rows=5)
    assert answer.cut and answer.rows["step"].tolist() == [0, 1, 2, 3, 4]
    assert not limited(tables, "select step from steps", max_rows=21).cut
    assert limited(tables, "select range as n from range(10000000000)", max_rows=2).rows["n"].tolist() == [0, 1]


@pytest.mark.parametrize(
    "text",
    [
        "with recursive t(n) as (select 1 union all select n + 1 from t) select count(*) from t",
        "select count(*) from range(1000000) a, range(1000000) b where (a.range * b.range) % 7 = 3",
    ],
)
def test_a_query_that_does_not_end_is_ended(tables, text):
    begun = time.monotonic()
    with pytest.raises(wb.UserError, match=r"^The query failed: it took more than 0.3 s; ask for less\.$"):
        limited(tables, text, seconds=0.3)
    assert time.monotonic() - begun < 10.3  # what a process may take to start, and the time given


@pytest.mark.parametrize("text", ["select repeat('x', 2000000000)", "select list_sum(range(1000000000))"])
def test_a_query_that_wants_gigabytes_gets_none(tables, text):
    with pytest.raises(wb.UserError, match=r"^The query (failed|took more)"):
        limited(tables, text, memory_bytes=2**28)


def test_the_limited_one_refuses_what_the_other_does(tables, tmp_path):
    for text in ("copy (select 1) to 'written'", "select * from read_text('/etc/passwd')", "select 1; select 2"):
        with pytest.raises(wb.UserError, match=r"^The query failed: "):
            limited(tables, text)
    with pytest.raises(wb.UserError, match="at most 10,000"):
        limited(tables, "select 1" + " " * 10_000)


def test_cells_are_text_of_bounded_length(tables):
    rows = limited(
        tables, "select repeat('<b>', 10000) as a, [1, 2] as b, 2::hugeint ** 100 as c, timestamp 'infinity' as d"
    ).rows
    assert len(rows["a"][0]) == 10_001 and rows["b"][0] == "[1, 2]" and isinstance(rows["d"][0], str)
    with pytest.raises(wb.UserError, match="more than 33,554,432 bytes"):
        limited(tables, "select repeat('x', 9000) from range(10000)", max_rows=10_000)
