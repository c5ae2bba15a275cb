"""How good a model is: many samples of each problem, pass@k, and how sure the numbers are.

passk, intervals   the statistics: unbiased pass@k, bootstrap intervals over problems
samples            one answer as it is drawn and kept: a line of samples.jsonl
summary, table     scores for each source and in all, differences between two evaluations, and their tables
problems, formats  the problems that a graph draws: rows of files or tasks, each with an id and a source
graphs, models     the graph that is run, and the model in it
folder             a folder of results: what was asked, what is there, what is missing
solved             the folder as data for training: problems that are sometimes solved

`realflow evaluate` holds it together; drawing and judging are calls of a graph.
"""
