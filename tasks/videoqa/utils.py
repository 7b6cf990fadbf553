"""Task functions of the video question answering sets."""


def doc_to_visual(doc):
    return [{"type": "video", "path": doc["video"]}]  # a bare path of a GIF would be taken for an image


def process_results(doc, results):
    """What is known before a judge compared the answer with the right one."""
    return {"answered": float(bool(results[0].strip()))}
