"""Stage 01 on files of one's own: what exports, spreadsheets and other people's scripts do to them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import call_stage, prepare

import common

USERS, ITEMS = 12, 10


def ratings(value=lambda place: 1 + place % 5, user="{}", item="{}", rows=USERS * ITEMS):
    """[(user, item, rating)] of all pairs; the rating by the pair's place."""
    return [(user.format(place % USERS + 1), item.format(place // USERS + 1), value(place))
            for place in range(rows)]


def csv_text(rows, header="user_id,item_id,rating", separator=","):
    lines = [header.replace(",", separator)]
    lines += [separator.join(map(str, row)) for row in rows]
    return "\n".join(lines) + "\n"


@pytest.fixture
def make(tmp_path, capsys):
    """make(ratings text or bytes, items text or None, flags) -> (what was printed, dataset)."""
    def run(text, items=None, *flags):
        (tmp_path / "r.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        if items is not None:
            (tmp_path / "i.csv").write_bytes(items if isinstance(items, bytes) else items.encode())
            flags = ["--items-file", tmp_path / "i.csv", "--title-col", "title", *flags]
        call_stage(prepare, "--run", tmp_path / "run", "--dataset", "csv",
                   "--ratings-file", tmp_path / "r.csv", *flags)
        return capsys.readouterr().out, common.load_dataset(tmp_path / "run")

    return run


def items_text(values, separator=",", item="{}"):
    """A line for each item: its id, title and values."""
    rows = [(item.format(number), f"Thing {number}", values(number)) for number in range(1, ITEMS + 1)]
    return csv_text(rows, "item_id,title,kinds", separator)


def hobbies(dataset):
    return [item["attributes"]["hobby"] for item in dataset.items]


# -------- what was dropped, what was understood

def test_what_the_filter_dropped_is_said_with_its_flag_and_its_users_are_written_down(make, tmp_path):
    rare = [(f"rare{number}", "1", 5) for number in range(3)]
    text, dataset = make(csv_text(ratings() + rare))
    assert "kept 120 of 123 rows, 12 of 15 users, 10 of 10 items (--min-interactions 4)" in text
    dropped = json.loads((tmp_path / "run" / "dropped_users.json").read_text())
    assert dropped == ["rare0", "rare1", "rare2"] and not set(dropped) & set(dataset.users)


def test_ratings_and_the_commonest_words_are_shown_with_their_counts(make):
    text, _ = make(csv_text(ratings()), items_text(lambda number: "b" if number > 3 else "a"),
                   "--hobby-col", "kinds")
    assert "ratings 1: 24, 2: 24, 3: 24, 4: 24, 5: 24; above 3 is liked" in text
    assert "words of hobby: 2, the commonest are b 7, a 3" in text


@pytest.mark.parametrize("cell", [
    "\"['Fishing', 'Gear']\"", "\"[\"\"Fishing\"\", \"\"Gear\"\"]\"", "Fishing|Gear", " fishing | GEAR |",
    "Fishing|nan|Gear|N/A|unknown|", "\"['Fishing' 'Gear']\"", "\"[Fishing, Gear]\"",
    "\"[{'id': 18, 'name': 'Fishing'}, {'id': 3, 'name': 'Gear'}]\"", "\"{'Fishing', 'Gear'}\"",
    "\"('Fishing', 'Gear')\"", "\"{Fishing,Gear}\"", "'Fishing'|'Gear'"])
def test_a_cell_of_several_values_has_them_all(make, cell):
    text, dataset = make(csv_text(ratings()), items_text(lambda number: cell), "--hobby-col", "kinds")
    assert hobbies(dataset) == [["fishing", "gear"]] * ITEMS and "WARNING" not in text


@pytest.mark.parametrize("cell, values", [
    ('["P\\u00eache", "R\\u0026B"]', ["pêche", "r&b"]), ('["7\\" vinyl"]', ['7" vinyl']),
    ("[{\"id\": 1, \"name\": \"Rock 'n' Roll\"}]", ["rock 'n' roll"]), ('[{"genre": "Gear"}]', ["gear"]),
    ("[]", []), ("[{[]: 1}]", ["{[]: 1}"]), ("a | N/A", ["a"]),
    ("(no genres listed)", []), ("(Sub)urban | town", ["(sub)urban", "town"]), ("(5)", ["(5)"]),
    ("('Action')", ["action"]), ("('Rock (UK)', 'Pop')", ["rock (uk)", "pop"]), ("{'a': 5}", []),
    ("(comedy)|(drama)", ["(comedy)", "(drama)"]), ("(indie) rock (uk)", ["(indie) rock (uk)"]),
    ("[comedy]|[drama]", ["[comedy]", "[drama]"]), ("()", []), ("( )", []), ("(indie)", ["(indie)"]),
    ("(Rock (UK), Pop)", ["rock (uk)", "pop"]), ("('Rock (UK)', None)", ["rock (uk)"]),
    ("({'name': 'Drama'}, {'name': 'Comedy (dark)'})", ["drama", "comedy (dark)"]),
    ('["Drama", null]', ["drama"])])
def test_lists_that_programs_write_are_read_as_they_are_meant(cell, values):
    assert prepare.values_of(cell, "|") == values


def test_given_words_are_spelled_as_values_are_and_a_rating_has_a_size():
    assert prepare.word_list("Music, Film  Noir") == ["music", "film noir"]
    with pytest.raises(ValueError, match="not within"):
        prepare.csv_rating("u", "i", "1e39")


def test_a_value_that_means_missing_is_no_word_whatever_a_loader_gives():
    source = SimpleNamespace(attributes={"a": {"hobby": ["", "Unknown", "rock"]}}, titles={"a": "A"})
    assert prepare.describe_items(source, ["a"])[0]["attributes"] == {"hobby": ["rock"]}


def test_a_file_that_is_gone_does_not_advise_to_put_the_demo_over_other_data(tmp_path):
    assert common.remedy(tmp_path, "users.json") == f"run: python 01_prepare_data.py --run {tmp_path}"
    (tmp_path / "interactions.npy").touch()
    assert "the flags of the first time" in common.remedy(tmp_path, "users.json")


def test_a_separator_does_not_cut_what_means_missing_nor_numbers():
    assert prepare.values_of("N/A", "/") == []
    for number in ("12,50", "1,234", "1,234,567.50", "1.234,50", "7"):
        assert prepare.values_of(number, ",") == [number]
    assert prepare.values_of("1997.0", "|") == ["1997"]  # a year that went through pandas
    assert prepare.values_of("3,7,12", ",") == ["3", "7", "12"]
    assert prepare.values_of("1990,1991", ",") == ["1990", "1991"]


def test_a_column_of_the_items_that_holds_nothing_is_a_warning(make):
    text, _ = make(csv_text(ratings()), items_text(lambda number: "[]"), "--hobby-col", "kinds")
    assert "WARNING: the column of the hobby holds no value" in text


def test_items_that_are_none_of_those_rated_are_refused(make):
    with pytest.raises(common.UserError, match="no rated item has a description: '1' is rated, 'tt1' is"):
        make(csv_text(ratings()), items_text(lambda number: "a", item="tt{}"))


def test_two_stray_quotes_do_not_swallow_the_lines_between_them(make):
    lines = csv_text([(*row, "ok") for row in ratings() * 3], "user_id,item_id,rating,note").split("\n")
    lines[4] = lines[4].replace("ok", '"great')
    lines[20] = lines[20].replace("ok", 'bad"')
    text, dataset = make("\n".join(lines))
    assert "skipped 1 bad of 360 records" in text and len(dataset.interactions) == 120


def test_a_text_of_several_lines_may_hold_commas(make):
    rows = [(number, f'"Hello {number},\nworld, again"') for number in range(1, ITEMS + 1)]
    text, dataset = make(csv_text(ratings()), csv_text(rows, "item_id,title"))
    assert "skipped" not in text and dataset.items[0]["title"] == "Hello 1, world, again"


def test_a_text_of_several_lines_may_stand_in_the_first_column(make):
    rows = [(f'"Hello\nworld {number}"', number, "kind") for number in range(1, ITEMS + 1)]
    text, dataset = make(csv_text(ratings()), csv_text(rows, "title,item_id,kinds"), "--hobby-col", "kinds")
    assert "skipped" not in text
    assert [item["title"] for item in dataset.items] == [f"Hello world {n}" for n in range(1, ITEMS + 1)]


def test_a_cell_of_too_many_lines_is_named_as_such(make):
    rows = [(number, f"Thing {number}") for number in range(1, ITEMS + 1)]
    long = '"' + "a line\n" * (prepare.MAX_BREAKS + 1) + '"'
    with pytest.raises(common.UserError, match=f"a quoted cell goes on for {prepare.MAX_BREAKS} lines"):
        make(csv_text(ratings()), csv_text([(99, long), *rows], "item_id,title"))


def test_an_item_that_its_rows_describe_differently_is_a_warning(make):
    """Such a value is of the interaction, and would reach the words from rows of the test, too."""
    header = "user_id,item_id,rating,mood"
    for odd, warning in (("bright", False), ("dark", True)):
        rows = [(*row, odd if row[:2] == ("1", "2") else "bright") for row in ratings()]
        text, _ = make(csv_text(rows, header), None, "--hobby-col", "mood")
        assert ("WARNING: 1 of 10 items are described differently in their rows of r.csv" in text) == warning
    items = [(number, "Thing", kind) for number in range(1, ITEMS + 1) for kind in "ab"]
    text, dataset = make(csv_text(ratings()), csv_text(items, "item_id,title,kinds"), "--hobby-col", "kinds")
    assert hobbies(dataset) == [["a", "b"]] * ITEMS and "described differently" not in text


def test_too_little_memory_is_no_bad_record(tmp_path, monkeypatch):
    def fails(*_):
        raise MemoryError

    with pytest.raises(MemoryError):
        list(prepare.good(["a record"], fails, tmp_path / "r.csv"))
    (tmp_path / "reviews.json").write_text("[]")
    monkeypatch.setattr(json, "loads", fails)
    with pytest.raises(MemoryError):
        prepare.records(tmp_path / "reviews.json")


def test_a_replacement_character_that_a_file_holds_is_utf_8(make):
    """Scraped texts have it; it says nothing of the file's encoding."""
    rows = [(number, f"caf\xe9 \ufffd {number}") for number in range(1, ITEMS + 1)]
    text, dataset = make(csv_text(ratings()), csv_text(rows, "item_id,title"))
    assert "UTF-8" not in text and dataset.items[0]["title"] == "caf\xe9 \ufffd 1"


def test_a_wrong_byte_at_the_end_of_a_part_is_no_traceback(tmp_path, capsys):
    """The file is read in parts of a MiB; the first wrong byte may be the last one of a part."""
    path = tmp_path / "i.csv"
    path.write_bytes(b"a" * (2**20 - 1) + b"\xe9bc\n1,M\xfcller\n" + b"b\n" * 9)
    assert prepare.encoding_of(path) == "cp1252"
    assert "not in UTF-8" in capsys.readouterr().out


def test_a_row_without_a_time_is_older_than_any_date(make):
    rows = [(*row, "1950-01-01" if at % 2 else "") for at, row in enumerate(ratings())]
    known = [row for row in rows if row[3]]
    _, dataset = make(csv_text(rows, "user_id,item_id,rating,day"), None, "--time-col", "day")
    found = [(dataset.users[user], str(dataset.items[item]["id"]))
             for user, item in dataset.interactions[:, :2].tolist()]
    assert set(found[-len(known):]) == {(str(user), str(item)) for user, item, _, _ in known}


def test_a_stray_quote_in_a_table_of_two_columns_swallows_no_lines(make):
    rows = [(number, f"Thing {number}") for number in range(1, ITEMS + 1)]
    rows[4] = (5, '"Rear Window')
    rows[7] = (8, 'Screen 12"')
    with pytest.raises(common.UserError, match="1 of 10 records cannot be read, the first is record 5"):
        make(csv_text(ratings()), csv_text(rows, "item_id,title"))


@pytest.mark.parametrize("raw, words", [
    ("NULL", "one is missing"), ("nan", "one is missing"), ("\\N", "one is missing"),
    ("7.6561E+16", "a spreadsheet rounded it"), ("N/A", "one is missing"), ("(null)", "one is missing"),
    ("1E+12", "a spreadsheet rounded it")])
def test_what_is_no_id_is_none(raw, words):
    with pytest.raises(ValueError, match=words):
        prepare.raw_id(raw)


def test_one_bad_byte_does_not_spoil_a_file_in_utf_8(make):
    rows = [(number, f"Misérables {number}") for number in range(1, ITEMS + 1)]
    text, dataset = make(csv_text(ratings()), csv_text(rows, "item_id,title").encode().replace(
        "Misérables 10".encode(), b"M\xfcller"))
    assert "WARNING: i.csv has 1 bytes that are no UTF-8" in text
    assert dataset.items[0]["title"] == "Misérables 1"


@pytest.mark.parametrize("first, words", [
    ("# a dump", "begins with '# a dump', which is no header"), ("-- Dump", "begins with '-- Dump'"),
    ('[{"user_id": 1}]', "or convert JSON to csv"), ("PK\x03\x04", "is a spreadsheet")])
def test_a_file_that_begins_with_no_header_is_said(make, first, words):
    with pytest.raises(common.UserError, match=words):
        make(first + "\n" + csv_text(ratings()))


def test_hints_and_empty_rows_of_spreadsheets_are_none_of_the_data(make):
    _, dataset = make("sep=;\n" + csv_text(ratings(), separator=";") + ";;\n" * 40)
    assert len(dataset.interactions) == 120


def test_markup_goes_and_comparisons_stay():
    assert prepare.clean_text("<b>If</b> x<y then 2>z<br/>") == "If x<y then 2>z"


def test_true_and_false_are_ratings(make):
    rows = [(user, item, ["False", "True"][place % 2]) for place, (user, item, _) in enumerate(ratings())]
    _, dataset = make(csv_text(rows), None, "--positive-above", "0")
    assert dataset.interactions[:, 2].mean() == 0.5


def test_another_separator_is_guessed_at_in_a_warning(make):
    items = items_text(lambda number: f'"fishing, gear{number}"')
    text, _ = make(csv_text(ratings()), items, "--hobby-col", "kinds")
    assert "WARNING: 10 of 10 values look like several in one, as 'fishing, gear1'" in text
    assert "--value-sep" in text
    text, dataset = make(csv_text(ratings()), items, "--hobby-col", "kinds", "--value-sep", ",")
    assert hobbies(dataset)[0] == ["fishing", "gear1"] and "WARNING" not in text


def test_several_lines_of_one_item_add_up(make):
    rows = [(number, f"Thing {number}", kind) for number in range(1, ITEMS + 1) for kind in ("a", "b", "a")]
    _, dataset = make(csv_text(ratings()), csv_text(rows, "item_id,title,kinds"), "--hobby-col", "kinds")
    assert hobbies(dataset) == [["a", "b"]] * ITEMS


def test_words_of_missing_values_are_no_values(make):
    missing = ["", "NaN", "null", "None", "N/A", "-", "unknown", "\\N", "n/a", "?"]
    text, dataset = make(csv_text(ratings()), items_text(lambda number: missing[number - 1]),
                         "--hobby-col", "kinds")
    assert hobbies(dataset) == [[]] * ITEMS and dataset.profiles[0]["words"] == {}
    assert "the LLM will choose its own" in text
    assert prepare.values_of("Fishing|nan|none", "|") == ["fishing"]


# -------- scales, implicit data

@pytest.mark.parametrize("value, flags, words", [
    (lambda place: place % 11, [], "WARNING: ratings go from 0 to 10, and above 3 is liked: 63% of the rows"),
    (lambda place: place % 101, [], "WARNING: ratings go from 0 to 100"),
    (lambda place: 1 + place % 10, ["--positive-above", "6"], None),
    (lambda place: 0.5 + place % 10 / 2, [], None),
    (lambda place: place % 2, ["--positive-above", "0"], None),
    (lambda place: 0 if place % 3 else 1 + place % 5, [],
     "WARNING: 80 of 120 ratings are 0, all others from 1 to 5. Leave them out if 0 means 'not rated'"),
    (lambda place: -1 if place % 9 == 0 else 6 + place % 5, ["--positive-above", "7"],
     "ratings are -1, all others from 6 to 10"),
    (lambda place: 99 if place % 5 == 0 else 1 + place % 5, [], "ratings are 99, all others from 2 to 5")])
def test_a_scale_that_does_not_fit_is_warned_of_with_its_counts(make, value, flags, words):
    text, _ = make(csv_text(ratings(value)), None, *flags)
    warnings = [line for line in text.split("\n") if line.startswith("WARNING: ") and "rating" in line]
    assert (words is None) == (not warnings), warnings
    assert words is None or words in text


@pytest.mark.parametrize("value, flags, words", [
    (lambda place: 1, [], "all 120 ratings are 1 (ratings); a recommender needs dislikes as well as likes"),
    (lambda place: 4 + place % 2, [], "every rating, from 4 to 5, is a like (--positive-above 3); give"),
    (lambda place: place % 2, [], "every rating, from 0 to 1, is a dislike (--positive-above 3); give")])
def test_data_without_dislikes_or_likes_end_at_once_in_one_line(make, tmp_path, value, flags, words):
    with pytest.raises(common.UserError) as error:
        make(csv_text(ratings(value)), None, *flags)
    assert words in str(error.value)
    assert not list((tmp_path / "run").glob("*"))


def test_a_file_without_ratings_says_what_a_negative_is(make):
    rows = [row[:2] for row in ratings()]
    match = "no column rating; it has user_id, item_id .*0 for what they saw"
    with pytest.raises(common.UserError, match=match):
        make(csv_text(rows, "user_id,item_id"))


# -------- headers and formats

@pytest.mark.parametrize("separator", [",", ";", "|", "\t"])
def test_the_header_tells_the_separator(make, separator):
    text, dataset = make(csv_text(ratings(), separator=separator),
                         items_text(lambda number: "a", separator), "--hobby-col", "kinds")
    assert len(dataset.interactions) == 120 and dataset.items[3]["title"] == "Thing 4"
    assert hobbies(dataset) == [["a"]] * ITEMS and "WARNING" not in text


def test_a_separator_in_a_column_s_name_is_none(make):
    rows = [(*row, 1) for row in ratings()]
    _, dataset = make(csv_text(rows, "user_id;item_id;rating;seen (1,2,3)".replace(";", ","), ";").replace(
        "seen (1;2;3)", "seen (1,2,3)"))
    assert len(dataset.interactions) == 120


def test_a_column_that_is_there_twice_is_refused(make):
    rows = [(*row, 1) for row in ratings()]
    with pytest.raises(common.UserError, match="has the column rating twice"):
        make(csv_text(rows, "user_id,item_id,rating,rating"))


@pytest.mark.parametrize("content", [b"", "user_id,item_id".encode("utf-16-le")])
def test_an_empty_file_and_one_that_is_no_text_are_said(make, content):
    with pytest.raises(common.UserError, match="is empty or no text"):
        make(content)


def test_a_blank_after_a_comma_does_not_hide_a_quote(make):
    rows = [(number, f' "Thing, {number}"') for number in range(1, ITEMS + 1)]
    _, dataset = make(csv_text(ratings()), csv_text(rows, "item_id, title"))
    assert dataset.items[0]["title"] == "Thing, 1"


def test_titles_that_mean_missing_are_none(make):
    rows = [(number, "nan" if number < 4 else f"Thing {number}") for number in range(1, ITEMS + 1)]
    text, dataset = make(csv_text(ratings()), csv_text(rows, "item_id,title"))
    assert "3 of 10 items have no title" in text and dataset.items[0]["title"] == "1"


@pytest.mark.parametrize("value", ["1,234", "1_0", "four", "nan", "inf", ""])
def test_what_is_no_number_is_no_rating(value):
    with pytest.raises(ValueError):
        prepare.csv_rating("u", "i", value)


def test_some_ids_that_a_spreadsheet_changed_are_a_warning(make):
    rows = [(f"{number:03d}" if number < 4 else number, f"Thing {number}") for number in range(1, ITEMS + 1)]
    text, _ = make(csv_text(ratings()), csv_text(rows, "item_id,title"))
    assert "WARNING: 3 of 10 rated items have no description, but '1' looks like '001'" in text


@pytest.mark.parametrize("flags", [["--items-file", "i.csv"], ["--title-col", "x"], ["--time-col", "x"]])
def test_flags_of_csv_files_are_refused_elsewhere(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        call_stage(prepare, "--run", tmp_path / "run", *flags)
    assert stop.value.code == 2 and f"{flags[0]} needs --dataset csv" in capsys.readouterr().err


def test_dislikes_may_have_negative_ratings(make):
    _, dataset = make(csv_text(ratings(lambda place: place % 2 - 1)), None, "--positive-above", "-1")
    assert dataset.interactions[:, 2].mean() == 0.5


def test_blanks_around_names_and_cells_are_none_of_theirs(make):
    rows = [(f" {user} ", f" {item}", f" {value} ") for user, item, value in ratings()]
    _, dataset = make(csv_text(rows, " user_id , item_id ,rating "))
    assert dataset.users[:2] == ["1", "2"] and len(dataset.interactions) == 120


def test_a_decimal_comma_is_one(make):
    rows = [(user, item, f"{value},5") for user, item, value in ratings()]
    text, dataset = make(csv_text(rows, separator=";"), None, "--positive-above", "3.4")
    assert "1.5: 24" in text and dataset.interactions[:, 2].mean() == pytest.approx(0.6)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_text_in_other_encodings_is_read(make, encoding):
    items = csv_text([(number, f"Misérables {number}") for number in range(1, ITEMS + 1)], "item_id,title")
    text, dataset = make(csv_text(ratings()).encode(encoding), items.encode(encoding))
    assert dataset.items[0]["title"] == "Misérables 1"
    warned = "WARNING: i.csv is not in UTF-8 and read as Windows-1252: '1,Mis" in text
    assert warned == (encoding == "cp1252")


def test_a_missing_header_is_said(make):
    with pytest.raises(common.UserError, match="its first line looks like data: put a header line"):
        make("\n".join(",".join(map(str, row)) for row in ratings()) + "\n")


def test_quoted_line_breaks_are_part_of_a_title(make):
    rows = [(number, f'"Thing\nof {number}"') for number in range(1, ITEMS + 1)]
    _, dataset = make(csv_text(ratings()), csv_text(rows, "item_id,title"))
    titles = [item["title"] for item in dataset.items]
    assert titles == [f"Thing of {number}" for number in range(1, ITEMS + 1)]


def test_a_quote_that_is_never_closed_costs_its_own_line_alone(make):
    lines = csv_text(ratings() * 3).split("\n")
    lines[7] = '1,"1,4'
    text, dataset = make("\n".join(lines))
    assert "skipped 1 bad of 360 records, the first is record 7" in text and len(dataset.interactions) == 120


@pytest.mark.parametrize("when, seconds", [
    ("2020-01-02", 1577923200), ("2020-01-02 00:00:01", 1577923201), ("2020-01-02T00:00:01Z", 1577923201),
    ("2020-01-02T01:00:01+01:00", 1577923201), ("1577923201", 1577923201), ("", -np.inf)])
def test_a_time_is_seconds_or_an_iso_date(when, seconds):
    assert prepare.csv_rating("u", "i", "4", when) == ("u", "i", 4.0, seconds)


def test_rows_stand_in_the_order_of_their_dates(make):
    rows = [(*row, f"2020-01-{28 - place % 28:02d}") for place, row in enumerate(ratings())]
    text, dataset = make(csv_text(rows, "user_id,item_id,rating,when"), None, "--time-col", "when")
    first = dataset.interactions[0]
    assert (dataset.users[first[0]], dataset.items[first[1]]["id"]) == rows[27][:2]


def test_dates_that_cannot_be_read_are_said(make):
    rows = [(*row, "31/12/2020") for row in ratings()]
    with pytest.raises(common.UserError, match="120 of 120 records cannot be read.*31/12/2020"):
        make(csv_text(rows, "user_id,item_id,rating,when"), None, "--time-col", "when")


@pytest.mark.parametrize("rated, listed", [("{}.0", "{}"), ("{}", "{}.0"), ("{}", "00{}"), ("AB{}", "ab{}")])
def test_ids_that_a_spreadsheet_changed_are_named(make, rated, listed):
    with pytest.raises(common.UserError, match="no rated item has a description: .* write the ids alike"):
        make(csv_text(ratings(item=rated)), items_text(lambda number: "a", item=listed))


def test_ids_most_of_which_a_spreadsheet_changed_are_named(make):
    rows = []
    for number in range(1, ITEMS + 1):
        rows.append((number if number < 4 else f"00{number}", f"Thing {number}", "a"))
    with pytest.raises(common.UserError, match="7 of 10 rated items have no desc.*'4' looks like '004'"):
        make(csv_text(ratings()), csv_text(rows, "item_id,title,kinds"))


def test_more_than_half_without_a_title_or_a_value_is_a_warning(make):
    rows = [(number, f"Thing {number}", "a" if number < 3 else "") for number in range(1, 5)]
    text, _ = make(csv_text(ratings()), csv_text(rows, "item_id,title,kinds"), "--hobby-col", "kinds",
                   "--hobby-words", "a,b")
    assert "WARNING: 6 of 10 items have no title" in text
    assert "WARNING: 8 of 10 items have no value for hobby" in text


# -------- releases

def test_films_are_read_in_utf_8_and_in_iso_8859_1_and_have_half_stars(tmp_path, capsys):
    films = [f"{number}::Misérables {number} (1995)::Drama" for number in range(1, ITEMS + 1)]
    lines = [line.encode("utf-8" if number % 2 else "latin-1") for number, line in enumerate(films)]
    (tmp_path / "movies.dat").write_bytes(b"\n".join(lines) + b"\n")
    rows = ratings(lambda place: (0.5, 4.5)[place % 2])
    lines = [f"{user}::{item}::{value}::{place}\n" for place, (user, item, value) in enumerate(rows)]
    (tmp_path / "ratings.dat").write_text("".join(lines))
    call_stage(prepare, "--run", tmp_path / "run", "--dataset", "ml-1m", "--data-dir", tmp_path)
    dataset = common.load_dataset(tmp_path / "run")
    assert [item["title"] for item in dataset.items] == [f"Misérables {n}" for n in range(1, ITEMS + 1)]
    assert len(dataset.interactions) == 120 and "skipped" not in capsys.readouterr().out


@pytest.mark.parametrize("text, price", [
    ("$14.99", 14.99), ("from 14.99", 14.99), ("$1,299.00 - $2,000.00", 1299.0), ("14,99 EUR", 14.99),
    (19.5, 19.5), (".a-box { width: 12px }", None), ("", None), ("None", None), ("Click to see price", None)])
def test_a_price_is_the_first_number_of_a_short_text(text, price):
    assert prepare.price_of(text) == price


def test_a_poorer_second_line_of_a_product_takes_nothing_away(tmp_path):
    reviews = [{"user_id": u, "parent_asin": i, "rating": r, "timestamp": 1} for u, i, r in ratings()]
    good = [{"parent_asin": f"{n}", "title": f"Thing {n}", "store": "Brand", "price": n}
            for n in range(1, ITEMS + 1)]
    poor = [{"parent_asin": f"{n}", "title": None, "store": "Unknown"} for n in range(1, ITEMS + 1)]
    for name, records in (("Toys.jsonl", reviews), ("meta_Toys.jsonl", good + poor)):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    call_stage(prepare, "--run", tmp_path / "run", "--dataset", "amazon", "--data-dir", tmp_path)
    items = common.load_dataset(tmp_path / "run").items
    assert [item["title"] for item in items] == [f"Thing {n}" for n in range(1, ITEMS + 1)]
    assert all(item["attributes"]["hobby"] == ["brand"] for item in items)
    assert np.unique([item["attributes"]["background"][0] for item in items]).size == 3
