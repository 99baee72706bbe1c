"""Train a prepared model under transformers.Trainer, pack it, and prove the file.

    python recipes/trainers/hf_trainer.py --model llama --dataset stdlib --max-steps 100 --output runs/hf-trainer

Nothing of llmqat runs inside the loop: any option of TrainingArguments works, checkpoints and resuming included.
Expected: a falling loss, and at the end "codes equal: True, scales equal: True".
"""

import argparse

import torch
from transformers import Trainer, TrainingArguments

import llmqat
from llmqat import QuantScheme


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llama", help="directory, Hub id or llama")
    parser.add_argument("--dataset", default="stdlib", help="as in llmqat finetune; conversations, too")
    parser.add_argument("--output", default="runs/hf-trainer")
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()

    model = llmqat.load_float(args.model, torch.float32)
    tokenizer, corpus = llmqat.load_tokenizer(args.model), llmqat.load_corpus(args.dataset)
    stream = llmqat.encode(tokenizer, corpus.train, 64 * args.length)
    calibration = llmqat.split_stream(stream, args.length, "calibration")
    batches = list(calibration[: len(calibration) // 4 * 4 or None].split(4))
    llmqat.prepare(model, QuantScheme(4, 32), init="gptq", calibration=batches)

    rows = llmqat.sequences(tokenizer, corpus.train, args.length, limit=args.max_steps * 4 * args.length)
    pairs = [row if row.ndim == 2 else (row, row) for row in rows]  # conversations come with labels of their own
    arguments = TrainingArguments(
        f"{args.output}/trainer",
        max_steps=args.max_steps,
        per_device_train_batch_size=4,
        learning_rate=5e-5,
        lr_scheduler_type="cosine",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=10,
        report_to="none",
    )
    examples = [{"input_ids": ids, "labels": labels} for ids, labels in pairs]
    Trainer(model, arguments, train_dataset=examples).train()

    llmqat.pack(model, args.output, tokenizer)
    check = llmqat.verify(args.output, against=model)
    print(f"codes equal: {check.codes_equal}, scales equal: {check.scales_equal}, {check.layers} layers")


if __name__ == "__main__":
    main()
