"""Text and models: which ones the project knows, where they lie, how they are prepared, read and cut into tokens.

Import from the modules: `catalog` (tables of corpora and models), `readers` (files to documents), `tokens` and `text`
(documents to token streams, windows and calibration segments), `sharegpt` (chats), `prepare` (fetch and convert),
`storage`, `paths` and `errors` (used by every package). Nothing heavy is imported here: `--help` stays fast.
"""
