"""Judging drawn images: rules, detectors, the colour classifier, the VQA judge, scores and reports.

The contract with a drawing model of lmms-eval, of either interface: a request says `modality: image` and `num_images`
in its `generation_kwargs`, and is answered with `{"text": "", "images": [path, ...]}` as JSON, one path an image that
Pillow can read, each existing until the run is scored. Nothing else is asked of a model.

Drawing and judging are two steps: a run's images are kept in a folder with what was asked for (`kept`), and the folder
is judged (`benchmark`), at once or later. `lmms_task` joins the two within lmms-eval.
"""
