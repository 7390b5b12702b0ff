"""The process beside each worker: prepares its environment, starts it, ships its log, reports.

Standard library only, and nothing of Tidemill outside this package: what it needs comes in a JSON file, and
it talks to the control plane over HTTP. See ``main`` for the story of one worker.
"""
