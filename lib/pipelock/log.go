package pipelock

import "os"

// maxLog bounds each of the two log files: what fills them is up to the guest.
const maxLog = 8 << 20

// logFile appends to a file and starts a new one when it is full, keeping the
// last one beside it as path.1. Its lines are not the audit log, which is the
// gate's: where the disk is full they are lost, and pipelock goes on.
type logFile struct {
	path string
	f    *os.File
	size int64
}

func (l *logFile) Write(line []byte) {
	if l.f != nil && l.size+int64(len(line)) > maxLog {
		l.Close()
		_ = os.Rename(l.path, l.path+".1")
	}
	if l.f == nil && !l.open() {
		return
	}
	n, _ := l.f.Write(line)
	l.size += int64(n)
}

func (l *logFile) open() bool {
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
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

func (l *logFile) Close() {
	if l.f != nil {
		l.f.Close()
		l.f = nil
	}
}
