"""Answers of packed models to twenty fixed questions beside those of the float model, for a person to read.

    python eval/answers.py runs/chat --model smollm2 --output runs/answers.json

Greedy search through the chat template, without a system prompt of its own. How many answers are the float model's word
for word is counted; whether the others are as good is for the reader.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from _results import write

import llmqat

QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colors.",
    "What is 12 plus 7?",
    "How many days does a week have?",
    "Write one sentence about the sea.",
    "Explain in two sentences what photosynthesis is.",
    "Give three tips for staying healthy.",
    "What is the opposite of 'hot'?",
    "Translate 'Good morning' into Spanish.",
    "Who wrote 'Romeo and Juliet'?",
    "Correct this sentence: 'She go to school every days.'",
    "Is a whale a fish or a mammal?",
    "What does a thermometer measure?",
    "Write a short poem about rain.",
    "Sort these words alphabetically: pear, apple, fig.",
    "Classify the sentiment as positive or negative: 'I loved this film.'",
    "Write a Python function that returns the square of a number.",
    "Why is the sky blue?",
    "Suggest a name for a small bakery.",
    "Summarize in one sentence: 'The train was late because a tree had fallen on the line. Nobody was hurt.'",
)


def answers(model: Any, tokenizer: Any, tokens: int) -> list[str]:
    """What a model says to each question."""
    found = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            ids = model.generate(**prompt, do_sample=False, max_new_tokens=tokens)
        found.append(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


def show(results: dict[str, Any]) -> None:
    """Print each question with its answers, then how many of a model are word for word those of the first."""
    for index, question in enumerate(results["questions"]):
        print(f"\n{index + 1}. {question}")
        for name, found in results["answers"].items():
            print(f"  [{name}] {found[index]}", flush=True)
    (_, first), *others = results["answers"].items()
    for name, found in others:
        same = sum(ours == theirs for ours, theirs in zip(found, first, strict=True))
        print(f"{name}: {same} of {len(first)} answers are word for word those of float")


def main() -> None:
    """Ask every model, print the answers, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("packed", nargs="+", type=Path, help="packed directories, named by their last part")
    parser.add_argument("--model", default="smollm2", help="the float model")
    parser.add_argument("--tokens", type=int, default=96, help="at most, of an answer")
    parser.add_argument("--output", type=Path, default=Path("runs/answers.json"))
    args = parser.parse_args()
    tokenizer = llmqat.load_tokenizer(args.model)
    found = {"float": answers(llmqat.load_float(args.model, torch.float32), tokenizer, args.tokens)}
    for directory in args.packed:
        found[directory.name] = answers(llmqat.load(directory, torch.float32), tokenizer, args.tokens)
    results = {
        "model": args.model,
        "tokens": args.tokens,
        "environment": llmqat.environment(),
        "questions": list(QUESTIONS),
        "answers": found,
    }
    write(args.output, results)
    show(results)


if __name__ == "__main__":
    main()
