"""Rows as other trainers have them: chat messages, system turns, image sources, choices, golds in tags."""

import base64
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from data_files import GOOD, png, write
from helpers import TEXT, VL, processing

from mm_agrae.errors import DataError
from mm_agrae.grading.accuracy import verify
from mm_agrae.tasks.files import FileTask
from mm_agrae.tasks.images import open_image

RED, LIME = png("red"), png("lime")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(RED)
    (tmp_path / "b.png").write_bytes(LIME)
    return tmp_path


def read(folder, row, **options):
    task = FileTask(write(folder / "rows.jsonl", [row]), **options)
    return task[0], task.notes


def colours(example):
    return [open_image(image).getpixel((0, 0)) for image in example.images]


def user(content, **more):
    return {"prompt": [{"role": "user", "content": content}], "answer": "red", **more}


IMAGE_PART, TEXT_PART = {"type": "image"}, {"type": "text", "text": "What colour?"}
URL = {"type": "image_url", "image_url": {"url": "a.png"}}

CHATS = {
    "trl_text": (user("<image>What colour?", images=["a.png"]), "TRL rows"),
    "trl_parts": (user([IMAGE_PART, TEXT_PART], images=["a.png"]), "TRL rows"),
    "trl_parts_from_arrow": (
        user([IMAGE_PART | {"text": None}, TEXT_PART | {"image": None}], images=[{"bytes": None, "path": "a.png"}]),
        "TRL rows",
    ),
    "untyped_parts": (user([{"image": "a.png"}, {"text": "What colour?"}]), "TRL rows"),
    "openai": ({"messages": [{"role": "user", "content": [URL, TEXT_PART]}], "answer": "red"}, "chat messages"),
    "openai_responses": (
        user([{"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "What colour?"}]),
        "TRL rows",
    ),
    "both": (user([URL, TEXT_PART], images=["a.png"]), "TRL rows"),
    "ms_swift": (
        {"messages": [{"role": "user", "content": "<image>What colour?"}], "solution": "red", "images": ["a.png"]},
        "ms-swift rows",
    ),
    "ms_swift_with_reply": (
        {
            "messages": [
                {"role": "user", "content": "<image>What colour?"},
                {"role": "assistant", "content": "It seems to be blue."},
            ],
            "solution": "<answer> red </answer>",
            "images": [{"path": "a.png"}],
        },
        "ms-swift rows",
    ),
    "llava": (
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>What colour?"}, {"from": "gpt", "value": "red"}],
        },
        "LLaVA conversations",
    ),
    "rounds": (
        {"conversation": [{"human": "<image>What colour?", "assistant": "red"}], "image": "a.png"},
        "chat messages",
    ),
    "spelt": (
        {
            "messages": json.dumps([{"role": "user", "content": "<image>What colour?"}]),
            "answer": "red",
            "image": "a.png",
        },
        "chat messages",
    ),
    "easy_r1": ({"problem": "<image>What colour?", "answer": "red", "images": ["a.png"]}, "EasyR1 rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_rows_of_other_trainers_are_recognised(folder, name):
    row, kind = CHATS[name]
    example, notes = read(folder, row)
    assert (example.question, example.answer, example.system, example.history) == (
        "<image>What colour?",
        "red",
        "",
        (),
    )
    assert colours(example) == [(255, 0, 0)]
    assert len(notes) == 1
    assert f"rows.jsonl: read as {kind} (question from " in notes[0]
    assert processing(VL).prompt(example).image_grid_thw.shape == (1, 3)


@pytest.mark.parametrize("truth", ["red", ["red"]])
def test_verl_parquet_needs_no_columns(folder, truth):
    row = {
        "data_source": "demo", "problem": "raw", "answer": "wrong",
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>What colour?"}],
        "images": [{"bytes": RED, "path": None}],
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"index": 3, "split": "train"},
    }  # fmt: skip
    path = folder / "verl.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), path)
    task = FileTask(str(path), meta=["extra_info.index", "extra_info.absent"], where={"extra_info.split": "train"})
    assert [(each.question, each.answer, each.system) for each in task] == [
        ("<image>What colour?", "red", "Be brief.")
    ] * 2
    assert colours(task[0]) == [(255, 0, 0)]
    assert task[0].meta == {"extra_info.index": 3, "extra_info.absent": None}
    assert (
        "read as verl rows (question from prompt, answer from reward_model.ground_truth, images from images; "
        in task.notes[0]
    )
    prompt = processing(VL, max_tokens=4096).prompt(task[0])
    assert "Be brief." in prompt.text


def test_dotted_names_reach_into_mappings_lists_and_their_text(folder):
    row = {"q": {"text": "1+1?"}, "gold": json.dumps({"values": ["3", "2"]})}
    example, _ = read(folder, row, columns={"question": "q.text", "answer": "gold.values.1"})
    assert (example.question, example.answer) == ("1+1?", "2")
    with pytest.raises(DataError, match=r"line 1: answer: no column 'gold\.value'"):
        read(folder, row, columns={"question": "q.text", "answer": "gold.value"})


def test_a_system_column_is_used_when_named_and_else_pointed_out(folder):
    row = {"system": "You are tutor 0.", "question": "1+1?", "answer": "2"}
    example, notes = read(folder, row)
    assert example.system == ""
    assert "the column system looks like a system turn and is not used; columns: {system: system}" in notes[1]
    example, notes = read(folder, row, columns={"system": "system"})
    assert len(notes) == 1
    text = processing(TEXT, system="Settings say this.").prompt(example).text
    assert "You are tutor 0." in text
    assert "Settings say this." not in text
    assert len(read(folder, row, columns={"system": None})[1]) == 1
    with pytest.raises(DataError, match="line 1: system: expected text"):
        read(folder, row | {"system": 5}, columns={"system": "system"})


def test_a_system_turn_can_be_left_out(folder):
    row = {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}], "answer": "2"}
    assert read(folder, row)[0].system == "Be brief."
    assert read(folder, row, columns={"system": None})[0].system == ""


def test_a_template_that_drops_or_refuses_the_turns_is_an_error_of_the_row(folder):
    template = folder / "t.jinja"
    template.write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[-1].content }}"
    )
    row = {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}], "answer": "2"}
    example, _ = read(folder, row)
    from mm_agrae.config import PromptSection
    from mm_agrae.model.processing import Processing

    with pytest.raises(
        DataError, match=r"line 1: the chat template takes no such turns \(no system\); columns: \{system: null\}"
    ):
        Processing(TEXT, PromptSection(chat_template=str(template))).prompt(example)
    template.write_text("{{ messages[-1].content }}")
    with pytest.raises(DataError, match="leaves the row's system turn out"):
        Processing(TEXT, PromptSection(chat_template=str(template))).prompt(example)


def test_earlier_turns_come_before_the_question_with_their_images(folder):
    row = {
        "conversations": [
            {"from": "human", "value": "<image>\nWhich colour?"},
            {"from": "gpt", "value": "red"},
            {"from": "human", "value": "And here? <image>"},
            {"from": "gpt", "value": "lime"},
        ],
        "image": ["a.png", "b.png"],
    }
    example, notes = read(folder, row)
    assert example.history == (("user", "<image>\nWhich colour?"), ("assistant", "red"))
    assert (example.question, example.answer) == ("And here? <image>", "lime")
    assert "answer from the assistant's turn" in notes[0]
    prompt = processing(VL).prompt(example)
    assert prompt.image_grid_thw.shape == (2, 3)
    assert [image.getpixel((0, 0)) for image in prompt.images] == [(255, 0, 0), (0, 255, 0)]
    assert prompt.text.index("Which colour?") < prompt.text.index("red") < prompt.text.index("And here?")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"problem": "<video>\nHow often?", "answer": "0", "videos": ["clip0.mp4"]}, "has a video or sound"),
        ({"problem": "How often?", "answer": "0", "videos": ["clip0.mp4"]}, r"columns: \{videos: null\}"),
        ({"problem": "How often?", "answer": "0", "audio": {"path": "x.wav"}}, "has a video or sound"),
        (user([{"type": "video", "video": "clip0.mp4"}, TEXT_PART]), "has a video or sound"),
        (user([{"type": "input_audio", "input_audio": {"data": "x"}}]), "has a video or sound"),
        ({"conversations": [{"from": "human", "value": "<video>Why?"}, {"from": "gpt", "value": "x"}]}, "has a video"),
        ({"prompt": [{"role": "tool", "content": "x"}], "answer": "1"}, "a turn of role str 'tool'"),
        ({"prompt": [{"role": "system", "content": "x"}], "answer": "1"}, "no user turn"),
        ({"prompt": [{"role": "user", "content": "x"}]}, "no answer: none of"),
        ({"prompt": [{"role": "user", "content": "x"}, 5], "answer": "1"}, "expected mappings with role and content"),
        (user([URL, IMAGE_PART, TEXT_PART]), "2 images in the messages do not fit 0"),
        (
            user("x", images=[{"url": "https://example.org/x.png?sig=1"}]),
            r"https://example.org/x\.png\?…: URLs are not",
        ),
        (
            user([URL | {"image_url": {"url": "http://example.org/y.png"}}]),
            "http://example.org/y.png: URLs are not fetched",
        ),
        (user("x", images=["data:image/png;base64,iVBORw0!"]), "damaged base64 of 30 characters"),
        (user("x", images=[{"bytes": None, "path": None}]), "image: expected a path or bytes"),
    ],
)
def test_what_cannot_be_read_is_an_error_of_the_row(folder, row, expected):
    with pytest.raises(DataError, match=f"rows.jsonl, line 1: .*{expected}") as caught:
        read(folder, row)
    assert len(str(caught.value)) < 1000


def test_videos_can_be_turned_off(folder):
    row = {"problem": "What does <video> do in HTML?", "answer": "plays", "video": "x.mp4"}
    assert read(folder, row, columns={"videos": None})[0].question.startswith("What does <video>")


ENCODED = base64.b64encode(RED).decode()


@pytest.mark.parametrize(
    "source",
    [
        ENCODED, f"data:image/png;base64,{ENCODED}", f"DATA:image/PNG;charset=x;base64,{ENCODED}", {"url": "a.png"},
        {"url": f"data:image/png;base64,{ENCODED}"}, {"bytes": ENCODED}, {"image_url": {"url": "a.png"}},
        {"path": "a.png", "bytes": None}, {"base64": "\n".join([ENCODED[:76], ENCODED[76:]])}, "./a.png",
    ],
)  # fmt: skip
def test_images_come_as_paths_bytes_data_uris_and_base64(folder, source):
    for images in (source, [source]):
        assert colours(read(folder, GOOD | {"images": images})[0]) == [(255, 0, 0)]


def test_a_list_of_images_may_be_spelt(folder):
    assert colours(read(folder, GOOD | {"images": "['a.png', 'b.png']"})[0]) == [(255, 0, 0), (0, 255, 0)]
    numbered = GOOD | {"problem": "<image 1> or <image 2>?", "image_1": "a.png", "image_2": "b.png", "image_3": None}
    assert colours(read(folder, numbered)[0]) == [(255, 0, 0), (0, 255, 0)]


@pytest.mark.parametrize(
    "gold",
    [
        "<answer> 7 </answer>", r"\boxed{7}", "<think>4+3</think><answer>\n7\n</answer>", [7],
        r"<answer>\boxed{7}</answer>", "<answer>6</answer> no: <answer>7</answer>",
    ],
)  # fmt: skip
def test_golds_in_tags_are_what_is_in_them(folder, gold):
    answer = read(folder, {"problem": "?", "solution": gold})[0].answer
    assert "answer>" not in answer
    assert verify(answer, r"so \boxed{7}")
    assert not verify(answer, r"so \boxed{8}")


def test_golds_that_are_lists(folder):
    assert read(folder, {"problem": "?", "answer": [200, 100.5, 800, 600]})[0].answer == "[200, 100.5, 800, 600]"
    graded = {"grader": "mine:grade"}
    assert read(folder, {"problem": "?", "answer": {"target": 24}}, grading=graded)[0].answer == '{"target": 24}'
    with pytest.raises(DataError, match="answer: expected text or a number, got dict"):
        read(folder, {"problem": "?", "answer": {"target": 24}})


CHOICES = {
    "list": ["4", "6", "8", "9"],
    "spelt list": "['4', '6', '8', '9']",
    "spelt JSON": '["4", "6", "8", "9"]',
    "mapping": {"A": "4", "B": "6", "C": "8", "D": "9"},
    "mapping in any order": {"b": "6", "a": "4", "d": "9", "c": "8", "e": None},
    "spelt mapping": "{'A': '4', 'B': '6', 'C': '8', 'D': '9'}",
    "ARC": {"text": ["4", "6", "8", "9"], "label": ["A", "B", "C", "D"]},
    "mappings": [{"label": letter, "text": text} for letter, text in zip("ABCD", "4689", strict=True)],
    "AQuA": ["A)4", "B)6", "C)8", "D)9"],
    "MathQA": "a ) 4 , b ) 6 , c ) 8 , d ) 9",
    "lines": "A. 4\nB. 6\nC. 8\nD. 9",
}


@pytest.mark.parametrize("gold", ["B", "b", "(B)", "B. 6", "(b) 6", "B: 6 cm", "6", "6 cm", "6.0", r"\boxed{B}",
                                  "The answer is B", "<answer>B</answer>", "Option B", "**B**",
                                  "['B']", r"$\boxed{6}$"])  # fmt: skip
@pytest.mark.parametrize("shape", CHOICES)
def test_choices_in_every_shape(folder, shape, gold):
    example, _ = read(folder, {"question": "Which?", "options": CHOICES[shape], "answer": gold})
    assert example.question == "Which?\n(A) 4\n(B) 6\n(C) 8\n(D) 9"
    assert (example.answer, example.grading["choices"]) == ("B", ["4", "6", "8", "9"])


@pytest.mark.parametrize("empty", [None, "", float("nan")])
def test_choices_in_columns_named_by_letters(folder, empty):
    example, _ = read(folder, {"question": "Which?", "A": "4", "B": "6", "C": empty, "answer": "B"})
    assert (example.question, example.answer) == ("Which?\n(A) 4\n(B) 6", "B")


@pytest.mark.parametrize("none", [None, "", [], "[]", {}])
def test_an_open_question_among_others_has_no_choices(folder, none):
    example, _ = read(folder, {"question": "How many?", "options": none, "answer": "6"})
    assert (example.question, example.answer, example.grading) == ("How many?", "6", {})


@pytest.mark.parametrize("gold", ["ABD", "A, B, D", "a b d", ["A", "B", "D"], "A and B and D"])
def test_several_letters(folder, gold):
    assert read(folder, {"question": "Which?", "choices": ["4", "6", "8", "9"], "answer": gold})[0].answer == "A, B, D"


def test_labels_of_the_row_decide(folder):
    numbered = {"text": ["3", "2", "4", "1"], "label": ["1", "2", "3", "4"]}
    example, notes = read(folder, {"question": "Which?", "choices": numbered, "answerKey": "3"})
    assert example.answer == "C"
    assert len(notes) == 1
    twice = {"text": ["3", "2", "4"], "label": ["1", "1", "2"]}
    assert read(folder, {"question": "Which?", "choices": twice, "answer": "4"})[0].answer == "C"


def test_positions_of_choices_by_an_explicit_option_alone(folder):
    row = {"question": "Which?", "choices": ["red", "lime", "blue"], "answer": 1}
    with pytest.raises(DataError, match=r"neither a letter up to C .*set choice_index: 0, or 1 to count from 1"):
        read(folder, row)
    assert read(folder, row, choice_index=0)[0].answer == "B"
    assert read(folder, row, choice_index=1)[0].answer == "A"
    with pytest.raises(DataError, match="'3' is no position from 0 to 2"):
        read(folder, row | {"answer": 3}, choice_index=0)
    numeric = {"question": "Which?", "choices": [2, 1, 3], "answer": 1}
    example, notes = read(folder, numeric | {"answer": 2})
    assert example.answer == "A"
    assert "1 gold answers are read as texts of choices and could be positions" in notes[1]
    assert len(read(folder, numeric)[1]) == 1  # the choice at 1 is 1


@pytest.mark.parametrize(
    ("choices", "gold", "expected"),
    [
        (["4", "6"], "B. 4", "neither a letter"),
        (["6 cm", "6 m"], "6", "neither a letter"),
        (["4", "6"], "C", "neither a letter"),
        (["4", "6"], "AA", "neither a letter"),
        (["B", "A"], "B", "the letter of one choice and the text of another"),
        (["B", "A"], r"\boxed{B}", "the letter of one choice and the text of another"),
    ],
)
def test_a_gold_choice_that_is_not_clear(folder, choices, gold, expected):
    with pytest.raises(DataError, match=f"line 1: answer: .*{expected}"):
        read(folder, {"question": "Which?", "choices": choices, "answer": gold})


def test_saved_data_sets_dictionaries_and_folders_of_parts(folder):
    rows = datasets.Dataset.from_list([GOOD | {"images": [{"bytes": RED, "path": None}]}] * 3)
    rows = rows.cast_column("images", datasets.Sequence(datasets.Image()))
    rows.save_to_disk(str(folder / "one"))
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(str(folder / "both"))
    (folder / "parts").mkdir()
    for number in range(2):
        rows.to_parquet(str(folder / "parts" / f"part-{number:05}.parquet"))
    for path, options, count in [
        ("one", {}, 3), ("both", {"split": "test"}, 1), ("both", {"split": "train"}, 3), ("parts", {}, 6),
    ]:  # fmt: skip
        task = FileTask(str(folder / path), **options)
        assert len(task) == count
        assert colours(task[count - 1]) == [(255, 0, 0)]
    with pytest.raises(DataError, match="set split to one of train, test"):
        FileTask(str(folder / "both"))
    rows.to_parquet(str(folder / "parts" / "test.parquet"))
    with pytest.raises(DataError, match="choose one file by split"):
        FileTask(str(folder / "parts"))
