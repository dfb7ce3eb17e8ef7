"""The documentation of recipes is the schema's own."""

from pathlib import Path

from potstill.recipes.read import library
from potstill.recipes.reference import key_rows, markdown

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def test_the_page_holds_the_table_of_keys_as_the_schema_has_it():
    assert PAGE.read_text(encoding="utf-8").endswith(markdown()), (
        "potstill recipes keys prints the table that belongs at the end of docs/recipes.md"
    )


def test_the_page_names_every_recipe_of_the_library():
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in library())


def test_every_key_is_there_once_and_explained():
    keys = [row.key for row in key_rows()]
    assert len({(row.kind, row.key) for row in key_rows()}) == len(keys)
    assert {
        "teacher.url",
        "teacher.column",
        "capture.outcomes",
        "student.lora.rank",
        "teacher.kind",
        "data.train[].weight",
        "objective.kd_ratio",
        "training.early_stopping.patience",
        "run.folder",
    } <= set(keys)
    assert not [
        row.key
        for row in key_rows()
        if not row.holds or (not row.meaning and row.key not in ("data.format", "data.on_bad_line.skip"))
    ]


def test_keys_of_several_kinds_stand_under_their_kind():
    kinds = {row.kind for row in key_rows() if row.key == "teacher.path"}
    assert kinds == {"local", "cache"}
    assert "`teacher.kind: server`" in markdown()
