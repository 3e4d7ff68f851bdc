"""MLflow is told what the rooms' files say: the files are the truth, the store a copy.

::

    params.mlflow.experiment
      chain <key of the params>    params, params.yaml, the report's metrics
        teacher                    its section of the params, what its files say
        data                       ... a run for each room
        distill/<stage>            RUNNING while it trains (`dgmr track follow`), KILLED where it died
        report                     with the student as a model that mlflow.pyfunc loads
      chain <key> <point>          of every point of a sweep, from prune on

``accounts`` reads the files, ``store`` makes the store say the same, ``tell`` has the store's failures
end in a warning, ``follow`` does so while a stage trains. Whoever tells compares first, under a lock,
and adds what is missing: to tell again, from several jobs at once or after any of them was killed comes
to the same as telling once. Runs and models that nobody needs are deleted as MLflow deletes (``mlflow gc``
removes their files).
"""
