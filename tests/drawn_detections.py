"""Ground truth and detections in COCO's format, drawn at random."""

import numpy as np

NUM_IMAGES = 24
CLASSES = (2, 5, 7)


def draw(seed, decimals=9):
    """Return annotations with crowd regions and all sizes, and detections that hit some of them.

    The last class has no objects in most images; one image is empty, one has no objects.
    """
    rng = np.random.default_rng(seed)
    annotations, detections = [], []
    for image in range(2, NUM_IMAGES + 1):
        for category in CLASSES:
            num_objects = rng.poisson(0.2 if category == 7 else 3) if image > 2 else 0
            for _ in range(num_objects):
                side = float(rng.choice([16, 60, 150]))
                box = [*rng.uniform(0, 800, 2).tolist(), side, side]
                ids = {"image_id": image, "category_id": category}
                crowd = {"iscrowd": int(rng.random() < 0.15), "area": side * side}
                annotations.append({"id": len(annotations) + 1, **ids, "bbox": box, **crowd})
                for _ in range(rng.integers(0, 3)):  # also a second detection of an object
                    moved = (np.array(box) + 0.15 * side * rng.normal(size=4)).tolist()
                    detections.append({**ids, "bbox": moved, "score": rng.random()})
            for _ in range(rng.poisson(1.5)):
                box = [*rng.uniform(0, 800, 2).tolist(), *rng.choice([16.0, 60.0, 150.0], 2)]
                ids = {"image_id": image, "category_id": category}
                detections.append({**ids, "bbox": box, "score": rng.random()})
    for detection in detections:
        detection["score"] = round(float(detection["score"]), decimals)
    content = {
        "info": {},
        "images": [{"id": i + 1, "width": 1000, "height": 1000} for i in range(NUM_IMAGES)],
        "categories": [{"id": i, "name": f"class {i}"} for i in CLASSES],
        "annotations": annotations,
    }
    return content, detections
