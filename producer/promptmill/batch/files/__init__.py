"""The files of a batch: inputs in several formats, results, failures, what an interrupted run left. No store here."""
