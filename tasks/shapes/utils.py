"""Task functions of zipeval_shapes."""


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def process_results(doc, results):
    """Exact match but for case, surrounding space and a final full stop; once over all and once for the type."""
    right = float(results[0].strip().rstrip(".").lower() == doc["answer"].lower())
    return {"accuracy": right, f"accuracy_{doc['type']}": right}
