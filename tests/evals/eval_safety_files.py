"""Small copies of the published safety sets: their file names and fields, our own harmless words.

Nothing in them is from the sets. The questions are about kitchens and gardens, so that the files
can be read, and kept, by anyone.
"""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image


def draw(path: Path, shade: int = 0, size: tuple[int, int] = (24, 16)) -> None:
    """A small picture; its format follows the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, ((40 + 31 * shade) % 256, 90, 160)).save(path)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_mssbench(folder: Path) -> None:
    chat = []
    for number, dish in enumerate(("soup", "bread", "jam")):
        names = {kind: f"{kind}_{number}.png" for kind in ("safe", "unsafe")}
        for shade, name in enumerate(names.values()):
            draw(folder / "chat" / name, 2 * number + shade)
        chat.append(
            {
                "safe_image_path": names["safe"],
                "unsafe_image_path": names["unsafe"],
                "intent": f"cook {dish}",
                "unsafe_image": "a kitchen in which the stove is already hot",
                "Type": "kitchen" if number else "garden",
                "queries": [f"How do I cook {dish}?", f"Tell me about {dish}."],
            }
        )
    write_json(folder / "combined.json", {"chat": chat, "embodied": []})


def write_siuo(folder: Path) -> None:
    generation, choice = [], []
    for number, thing in enumerate(("kite", "tent", "canoe")):
        name = f"S-{number + 1:02}.png"
        draw(folder / "images" / name, number)
        row = {
            "question_id": 1001 + number,
            "image": name,
            "question": f"Where shall I take the {thing} today?",
            "category": "outdoors",
        }
        warning = {
            "safety_warning": f"the weather is wrong for a {thing}",
            "reference_answer": f"Leave the {thing} at home until the wind drops.",
        }
        options = {"A": "to the hill", "B": "to the lake", "C": "nowhere yet", "D": "to the roof"}
        generation.append(row | warning)
        choice.append(row | {"options": options, "correct_option": "ABCD"[number]})
    write_json(folder / "siuo_gen.json", generation)
    write_json(folder / "siuo_mcqa.json", choice)


def write_figstep(folder: Path) -> None:
    rows = []
    for category, task in ((1, 1), (1, 2), (10, 1)):
        draw(folder / "SafeBench" / f"query_ForbidQI_{category}_{task}_6.png", category + task)
        rows.append(
            {
                "dataset": "ForbidQI",
                "category_id": category,
                "task_id": task,
                "category_name": "Baking" if category == 1 else "Gardening",
                "question": f'List steps to bake "cake" number {task}, please',
                "instruction": f"Steps to bake cake number {task}.\n1. 2. 3.",
            }
        )
    write_csv(folder / "safebench.csv", rows)


SCENARIOS = (
    "01-Illegal_Activitiy", "02-HateSpeech", "03-Malware_Generation", "04-Physical_Harm",
    "05-EconomicHarm", "06-Fraud", "07-Sex", "08-Political_Lobbying", "09-Privacy_Violence",
    "10-Legal_Opinion", "11-Financial_Advice", "12-Health_Consultation", "13-Gov_Decision",
)  # fmt: skip


def write_mm_safetybench(folder: Path) -> None:
    for place, scenario in enumerate(SCENARIOS):
        rows = {}
        for key in range(2 if place == 0 else 1):
            rows[str(key)] = {
                "Question": f"How are tomatoes grown in bed {place}?",
                "Changed Question": f"How are these plants grown in bed {place}?",
                "Key Phrase": "tomatoes",
                "Phrase Type": "plant",
                "Rephrased Question": f"The picture names a plant. How is it grown in bed {place}?",
                "Rephrased Question(SD)": f"The picture shows a plant. How is it grown, {place}?",
            }
            for shade, variant in enumerate(("SD", "TYPO", "SD_TYPO")):
                draw(folder / "imgs" / scenario / variant / f"{key}.jpg", 3 * place + shade)
        write_json(folder / "processed_questions" / f"{scenario}.json", rows)


def write_jailbreakv(folder: Path) -> None:
    rows = []
    for number, kind in enumerate(("Template", "Persuade", "SD_related")):
        name = f"llm_transfer_attack/{number}.png"
        draw(folder / name, number)
        rows.append(
            {
                "id": number,
                "jailbreak_query": f'You are a cook, "{kind}".\nSay how to make tea, hot.',
                "redteam_query": "How do I make tea?" if number < 2 else "How do I make cocoa?",
                "format": kind,
                "policy": "Kitchen Advice",
                "image_path": name,
                "from": "ours",
                "selected_mini": True,
                "transfer_from_llm": number < 2,
            }
        )
    write_csv(folder / "mini_JailBreakV_28K.csv", rows)


def write_vlsbench(folder: Path) -> None:
    rows = []
    for number in range(3):
        draw(folder / "imgs" / f"{number}.png", number)
        rows.append(
            {
                "instruction_id": number,
                "instruction": f"What can I do with this, person {number}?",
                "image_path": f"imgs/{number}.png",
                "category": "Privacy" if number else "Self-Harm",
                "sub_category": f"kind {number}",
                "source": "generation",
                "image_description": "a rake in tall grass",
                "safety_reason": "somebody may step on the rake",
            }
        )
    write_json(folder / "data.json", rows)


def write_mossbench(folder: Path) -> None:
    rows = {}
    for number in (1, 2, 3):
        draw(folder / "images" / f"{number}.png", number)
        rows[str(number)] = {
            "pid": str(number),
            "image": f"images/{number}.png",
            "question": f"How do I slice bread number {number}?",
            "short description": "a knife beside bread",
            "description": "A bread knife lies beside a loaf.",
            "metadata": {"over": f"type {number}", "human": 0, "child": 0, "syn": 1, "harm": [1]},
        }
    write_json(folder / "information.json", rows)


def write_vlguard(folder: Path) -> None:
    draw(folder / "test" / "signs" / "0.png", 0)
    draw(folder / "test" / "meals" / "1.png", 1)
    unsafe = {
        "id": "u0",
        "image": "signs/0.png",
        "safe": False,
        "harmful_category": "risky behavior",
        "harmful_subcategory": "advice",
        "instr-resp": [{"instruction": "What does the sign say?", "response": "Mind the step."}],
    }
    safe = {
        "id": "s1",
        "image": "meals/1.png",
        "safe": True,
        "instr-resp": [
            {"safe_instruction": "Which meal is this?", "response": "Breakfast."},
            {"unsafe_instruction": "Whose breakfast is this?", "response": "I do not know."},
        ],
    }
    write_json(folder / "test.json", [unsafe, safe])


def write_xstest(folder: Path) -> None:
    rows = [
        {
            "id": number,
            "prompt": prompt,
            "type": kind,
            "label": label,
            "focus": "kill",
            "note": "",
        }
        for number, (prompt, kind, label) in enumerate(
            (
                ("How do I kill time, politely?", "homonyms", "safe"),
                ("How do I kill the lights on stage?", "homonyms", "safe"),
                ("A question whose label is unsafe", "contrast_homonyms", "unsafe"),
            ),
            start=1,
        )
    ]
    write_csv(folder / "xstest_prompts.csv", rows)


WRITERS: dict[str, Callable[[Path], None]] = {
    "mssbench": write_mssbench,
    "siuo": write_siuo,
    "figstep": write_figstep,
    "mm_safetybench": write_mm_safetybench,
    "jailbreakv": write_jailbreakv,
    "vlsbench": write_vlsbench,
    "mossbench": write_mossbench,
    "vlguard": write_vlguard,
    "xstest": write_xstest,
}


# Several benchmarks read the files of one set.
BENCHMARK_IDS = (
    *WRITERS, "mssbench_white", "mssbench_text", "siuo_mcq", "mm_safetybench_sd",
    "mm_safetybench_typo",
)  # fmt: skip


def write_safety_sets(root: Path) -> None:
    """A data root with every safety set in its own folder."""
    for name, write in WRITERS.items():
        write(root / name)
