"""Transfer to object detection and instance segmentation: data sets, detectors, training, scores."""
