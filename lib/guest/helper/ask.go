//go:build linux

package helper

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/bottle-tools/bottle/lib/guest"
)

// The gate speaks HTTP/1.1. The few lines of it that are needed are written out
// here: net/http would double the helper and the time that it takes to start.

// Limits of what the gate answers, and how long one answer may take: it dials a
// host before it answers a CONNECT.
const (
	maxHead     = 16 << 10
	maxBody     = 64 << 10
	askTimeout  = 5 * time.Second
	openTimeout = time.Minute
)

// A gate that died is there again within a second. Its clients are let wait
// that long: the pauses between the tries.
// The first pause is none: a connection that was kept may have ended long ago.
var tries = []time.Duration{0, 0, 20 * time.Millisecond, 80 * time.Millisecond, 200 * time.Millisecond, 300 * time.Millisecond, 500 * time.Millisecond}

// errRefused tells that the policy has nothing open of a name.
var errRefused = errors.New("refused by the policy")

// answer is the head of an HTTP answer.
type answer struct {
	status int
	head   []byte // as it came, up to and with the empty line
	rest   []byte // what came behind it
	length int    // of the body, 0 where the head does not tell
}

// readAnswer reads from c until a head is complete. io.EOF means that nothing
// came.
func readAnswer(c io.Reader) (answer, error) {
	buf := make([]byte, 0, 1<<10)
	for {
		if len(buf) == cap(buf) {
			buf = append(buf, 0)[:len(buf)]
		}
		n, err := c.Read(buf[len(buf):cap(buf)])
		from := max(0, len(buf)-3)
		buf = buf[:len(buf)+n]
		if i := bytes.Index(buf[from:], []byte("\r\n\r\n")); i >= 0 {
			end := from + i + 4
			return parseAnswer(buf[:end:end], buf[end:])
		}
		switch {
		case len(buf) > maxHead:
			return answer{}, errors.New("the gate's answer has no end")
		case err == io.EOF && len(buf) > 0:
			return answer{}, io.ErrUnexpectedEOF
		case err != nil:
			return answer{}, err
		}
	}
}

func parseAnswer(head, rest []byte) (answer, error) {
	a := answer{head: head, rest: rest}
	line, fields, _ := bytes.Cut(head, []byte("\r\n"))
	proto, after, _ := bytes.Cut(line, []byte(" "))
	code, _, _ := bytes.Cut(after, []byte(" "))
	status, err := strconv.Atoi(string(code))
	if err != nil || len(code) != 3 || !bytes.HasPrefix(proto, []byte("HTTP/1.")) {
		return answer{}, errors.New("the gate's answer is no HTTP")
	}
	a.status = status
	for line := range bytes.SplitSeq(fields, []byte("\r\n")) {
		name, value, _ := bytes.Cut(line, []byte(":"))
		if bytes.EqualFold(name, []byte("content-length")) {
			if a.length, err = strconv.Atoi(string(bytes.TrimSpace(value))); err != nil || a.length < 0 {
				return answer{}, errors.New("the gate's answer has no length")
			}
		}
	}
	return a, nil
}

// asker asks the gate about names, over one connection that it keeps.
type asker struct {
	dial func() (net.Conn, error)

	mu   sync.Mutex
	conn net.Conn
}

// ask gives what is open of name, errRefused where nothing is, and any other
// error where there was no answer. name has the characters of names only.
func (a *asker) ask(name string) (guest.Lookup, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var l guest.Lookup
	var err error
	for _, pause := range tries {
		time.Sleep(pause)
		if l, err = a.once(name); err == nil || errors.Is(err, errRefused) {
			break
		}
		if a.conn != nil {
			a.conn.Close()
			a.conn = nil
		}
	}
	return l, err
}

func (a *asker) once(name string) (guest.Lookup, error) {
	var l guest.Lookup
	if a.conn == nil {
		c, err := a.dial()
		if err != nil {
			return l, err
		}
		a.conn = c
	}
	_ = a.conn.SetDeadline(time.Now().Add(askTimeout))
	if _, err := io.WriteString(a.conn, "GET "+guest.LookupPath+"?name="+name+" HTTP/1.1\r\nHost: "+guest.LookupHost+"\r\n\r\n"); err != nil {
		return l, err
	}
	got, err := readAnswer(a.conn)
	if err != nil {
		return l, err
	}
	if got.length > maxBody || len(got.rest) > got.length {
		return l, errors.New("the gate's answer is too long")
	}
	body := make([]byte, got.length)
	if _, err := io.ReadFull(a.conn, body[copy(body, got.rest):]); err != nil {
		return l, err
	}
	switch {
	case got.status == 200:
		return l, json.Unmarshal(body, &l)
	case got.status >= 400 && got.status < 500:
		return l, errRefused
	}
	return l, fmt.Errorf("the gate answered %d", got.status)
}

// openTunnel asks the gate, over up, for a way to host and port. A status other
// than 200 is the gate's refusal, of which the head is read. io.EOF: the gate is
// gone, and has done nothing.
func openTunnel(up net.Conn, host string, port int) (answer, error) {
	target := net.JoinHostPort(host, strconv.Itoa(port))
	_ = up.SetDeadline(time.Now().Add(openTimeout))
	if _, err := io.WriteString(up, "CONNECT "+target+" HTTP/1.1\r\nHost: "+target+"\r\n\r\n"); err != nil {
		return answer{}, io.EOF // it reads a request before anything else
	}
	a, err := readAnswer(up)
	_ = up.SetDeadline(time.Time{})
	return a, err
}
