"""docs/families.md says what its data file says, of every family that is made."""

import json

from bench_families import DATA, PAGE, page
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
        for name, value in record.items():
            if name.endswith(("logprob", "gradient")):
                assert value <= (1e-5 if name == "update_gradient" else 1e-4), (record["family"], name)
