"""Stages of a training run: build the embedded target, regenerate responses, train the drafter, report.

The top room: what joins other rooms lives here, so that entry points and scripts stay a few lines. Each stage leaves
its result in the run's folder when it is whole and does nothing when it finds it there; an interrupted run is started
again with the same command.
"""
