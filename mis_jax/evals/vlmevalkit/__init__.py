"""What VLMEvalKit's benchmarks, prompts, matching and files are, so that numbers compare with its.

Everything here follows its commit `e8e78f05` with its class for InternVL. Where it differs:

- An answer that its rules cannot match goes there to a language model and, when that fails too,
  to a random option. Here it is `unparsed`. Its policy `exact_matching` calls such an answer
  wrong: that score is the lower bound that our reports print beside the rate.
- An open question's answer that is too long to be searched is `unparsed` too, not wrong.
- Its environment variables are not followed: `VERBOSE`, which makes "A" an article, and
  `USE_COT`, which asks for reasoning.
- Images are shown as published. It saves a single one as JPEG once more before a model sees it.
- Cells stay text. Its reader may make numbers of a column, so that an option "3.10" becomes "3.1".
"""
