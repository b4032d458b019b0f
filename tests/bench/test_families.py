"""docs/families.md says what its data file says, of every family that is made."""

import json

from bench_families import DATA, ERRORS, PAGE, limit, page
from tiny_families import FAMILIES


def test_the_page_is_made_from_the_data() -> None:
    records = json.loads(DATA.read_text())["families"]
    assert [record["family"] for record in records] == list(FAMILIES)
    text = PAGE.read_text()
    assert page(text, records) == text


def test_what_is_promised_was_measured() -> None:
    for record in json.loads(DATA.read_text())["families"]:
        assert record["sampler"] in ("packed", "generic"), record["family"]
        assert record["update"] == "packed", record["family"]
        for name in ERRORS:
            without = name.startswith("frozen") and not record["pictures"]
            assert (record[name] is None) if without else record[name] <= limit(name), (record["family"], name)
