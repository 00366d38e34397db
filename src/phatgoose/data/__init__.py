"""Text in, tokens out: a jsonl file becomes `Example`s (examples), `Encoder` makes each a row of
token ids (encoder), and rows of similar length are padded into a batch (batching, `Encoder.collate`).
"""
