"""Writes event_golden.tfevents with TensorBoard's own classes: pip install tensorboard==2.21.0; python event_golden.py"""
import os
import struct
import zlib
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter


def png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(range(width)) for _ in range(height))
    # Stored, not compressed: the bytes do not depend on the version of zlib.
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 0)) + chunk(b"IEND", b"")


folder = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(folder, "event_golden.png"), "wb") as file:
    file.write(png(5, 3))
with open(os.path.join(folder, "event_golden.tfevents"), "wb") as file:
    writer = RecordWriter(file)
    events = [
        event_pb2.Event(wall_time=1700000000.25, step=0, file_version="brain.Event:2"),
        event_pb2.Event(wall_time=1700000000.25, step=301,
                        session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START)),
        event_pb2.Event(wall_time=1700000000.25, step=300, summary=summary_pb2.Summary(value=[
            summary_pb2.Summary.Value(tag="loss", simple_value=0.125),
            summary_pb2.Summary.Value(tag="lr", simple_value=1e-3)])),
        event_pb2.Event(wall_time=1700000000.25, step=300, summary=summary_pb2.Summary(value=[
            summary_pb2.Summary.Value(tag="sheet", image=summary_pb2.Summary.Image(
                height=3, width=5, colorspace=4, encoded_image_string=png(5, 3)))])),
    ]
    for event in events:
        writer.write(event.SerializeToString())
