"""Writes the training data of RCL: a teacher gives each training example a reasoning path, which is checked.

RCL (arXiv 2310.06762, section 5) trains on reasoning paths that GPT-4 wrote from a prompt and three demonstrations per
task, checked against the right answers. The paper's prompts are not published; the YAML files here are ours.

    trace-bench annotate OUT --model TEACHER        then: TRACE_REASONING=OUT python -m trainers.rcl ...

The teacher decides on no answer: what is written is its path, the official marker and the answer of the data, verbatim.

    OUT/
      <FOLDER>/{train,eval,test}.json   the official reasoning layout
      annotate-cache.jsonl              every reply, so that nothing is paid twice
      review.csv                        random rows for people to read
      annotation.md annotation.json     how it went; the second is written last: the folder is done
"""
