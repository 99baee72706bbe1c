"""Everything that llmqat leans on in transformers, peft, accelerate and torch and that is not public there.

Each file is one library, each function one need: `register.leans_on` names what it leans on and the test that fails
first, and says in one line what is missing where a version of the library has moved it. Private names are used in here
and nowhere else; where there is a public door, it is taken instead: `generate(custom_generate=...)`, subclasses of
`Cache`, hooks.
"""
