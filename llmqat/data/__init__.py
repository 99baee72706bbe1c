"""Everything that reads text: from files and the Hub to the token ids of training, calibration and evaluation.

`corpus` is the way in: files (`text_files`, `sources`, `folders`) or the Hub (`hub`, `named_sets`) give rows, `layouts`
and `messages` make documents of rows, `splits` holds some of them out. `tokens`, and for conversations `template` and
`chat`, make tensors of documents.
"""
