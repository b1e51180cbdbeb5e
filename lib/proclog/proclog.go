// Package proclog is the log of a program that a keeper keeps running.
package proclog

import "os"

// Max bounds each of the two log files, in bytes: what fills them is up to the
// guest.
const Max = 8 << 20

// File appends to a file and starts a new one when it is full, keeping the last
// one beside it as Path.1. It belongs to one goroutine. Its lines are not the audit log, which is the
// gate's: where the disk is full they are lost, and pipelock goes on.
type File struct {
	Path string
	f    *os.File
	size int64
}

// Write appends a line. It has no error: see File.
func (l *File) Write(line []byte) {
	if l.f != nil && l.size+int64(len(line)) > Max {
		l.Close()
		_ = os.Rename(l.Path, l.Path+".1")
	}
	if l.f == nil && !l.open() {
		return
	}
	n, _ := l.f.Write(line)
	l.size += int64(n)
}

func (l *File) open() bool {
	f, err := os.OpenFile(l.Path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return false
	}
	fi, err := f.Stat()
	if err != nil {
		f.Close()
		return false
	}
	l.f, l.size = f, fi.Size()
	return true
}

// Close may be called at any time; the next Write opens the file again.
func (l *File) Close() {
	if l.f != nil {
		l.f.Close()
		l.f = nil
	}
}
