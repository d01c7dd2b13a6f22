"""What runs beside guests on their host: one asyncio process that alone holds their QMP monitors.

    Monitor   one QMP connection: commands of an allow-list, every answer bounded in time, events in their order
    guest     what a monitor tells of a guest: its disks, their nodes, bitmaps and IOThreads
    standin   has the disks of a machine that is off, and is cut in its place
    files     freezes a guest's file systems through its own agent before the cut, if that can be
    cut       stops a guest, puts a view of every disk in place, lets it run again
    stage     the image that a view is copied to, and that everybody else reads

A guest comes first: whatever fails here, it runs on within its deadline and sees no error.
"""
