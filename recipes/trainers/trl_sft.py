"""LoRA inside the quantizer under trl's SFTTrainer, on conversations, with loss on the answers only.

    python recipes/trainers/trl_sft.py --model llama --dataset alpaca.json --max-steps 100 --output runs/trl-sft

trl trains the PeftModel that llmqat.add_lora returns; leave its own peft_config out, which would put adapters beside
the quantizer. Expected: a falling loss, and at the end "codes equal: True, scales equal: True".
"""

import argparse

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import llmqat
from llmqat import QuantScheme


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llama", help="directory, Hub id or llama")
    parser.add_argument("--dataset", required=True, help="conversations, as in llmqat finetune")
    parser.add_argument("--output", default="runs/trl-sft")
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()

    model = llmqat.load_float(args.model, torch.float32)
    tokenizer, corpus = llmqat.load_tokenizer(args.model), llmqat.load_corpus(args.dataset, rows="chat")
    stream = llmqat.encode(tokenizer, corpus.train, 64 * args.length)
    calibration = llmqat.split_stream(stream, args.length, "calibration")
    batches = list(calibration[: len(calibration) // 4 * 4 or None].split(4))
    llmqat.prepare(model, QuantScheme(4, 32), init="gptq", calibration=batches)
    model = llmqat.add_lora(model, r=32)

    # The last answer is the completion; its loss is all that trl counts.
    rows = [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in corpus.train if talk[-1]["role"] == "assistant"]
    config = SFTConfig(
        f"{args.output}/trainer",
        max_steps=args.max_steps,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        max_length=args.length,
        completion_only_loss=True,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=10,
        report_to="none",
    )
    SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()

    llmqat.pack(model, args.output, tokenizer)
    check = llmqat.verify(args.output, against=model)
    print(f"codes equal: {check.codes_equal}, scales equal: {check.scales_equal}, {check.layers} layers")


if __name__ == "__main__":
    main()
