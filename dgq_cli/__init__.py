"""The `dgq` command: one file a command; reads arguments, calls the library, renders. No tensors here."""
