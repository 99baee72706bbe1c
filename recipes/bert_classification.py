# python recipes/bert_classification.py MODEL train.jsonl test.jsonl OUT
# A classifier, fine-tuned on its task before (rows as in SST-2, {"sentence": "...", "label": 0}), through an int4 grid.
# Expected on the rows of its test: accuracy 0.9675 float, 0.9675 rounded, 0.9725 trained and packed. SST-2 was not run.
import sys

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import llmqat

source, train, test, output = sys.argv[1:]
model, tokenizer = AutoModelForSequenceClassification.from_pretrained(source), AutoTokenizer.from_pretrained(source)
rows = load_dataset("json", data_files={"train": train, "test": test})
rows = rows.map(lambda row: tokenizer(row["sentence"], truncation=True, max_length=128))
options = TrainingArguments(output + "/trainer", num_train_epochs=3, save_strategy="no", report_to="none")
right = {"compute_metrics": lambda result: {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean()}}
data = {"train_dataset": rows["train"], "eval_dataset": rows["test"], "processing_class": tokenizer}
trainer = Trainer(model, options, **data, **right)
print("float", trainer.evaluate()["eval_accuracy"])
llmqat.prepare(model, llmqat.QuantScheme(bits=4, group_size=32))
print("rounded", trainer.evaluate()["eval_accuracy"])
trainer.train()
print("trained", trainer.evaluate()["eval_accuracy"])
packed = llmqat.load(llmqat.pack(model, output, tokenizer))
print("packed", Trainer(packed, options, **data, **right).evaluate()["eval_accuracy"])
