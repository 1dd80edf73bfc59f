"""The table of what works where, in docs/attention.md, is what is found by trying."""

from support.attention_support import arguments_of_features, arguments_of_operator, table


def test_the_table_is_what_is_found_by_trying(repository):
    page = (repository / "docs/attention.md").read_text()
    found = table()
    assert found in page, f"docs/attention.md needs this table:\n{found}"


def test_every_argument_is_in_the_table():
    assert arguments_of_features() == arguments_of_operator()
